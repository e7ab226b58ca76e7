// Every schema of torch.ops.mage, and nothing else but the thread setting. An op's kernels are registered in <op>.cpp.
// Tensors come first and are positional; what follows `*` is keyword-only. A mutated tensor has a named alias set and
// the op then returns (): the functional ops are the ones that torch.compile can reorder. Letters are those of
// mage/types.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "core/parallel.h"
#include "tensor_checks.h"

namespace {

int torch_num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void set_num_threads(int64_t n) {
    MAGE_CHECK(n >= 0 && n < int64_t{1} << 31, "set_num_threads: n must be in [0, 2^31), got ", n);
    mage::core::set_num_threads(static_cast<int>(n));
}

}  // namespace

STABLE_TORCH_LIBRARY(mage, m) {
    mage::core::set_num_threads_source(torch_num_threads);

    // Threads of the CPU backend. 0, the default, follows torch.get_num_threads() at every call.
    m.def("set_num_threads(int n) -> ()");

    // Debug switch: when on, ops also check values that live on the device, and throw. Returns the state before. Waits
    // for the device at every op. debug_flag is the switch's address, for mage_ops_cuda.
    m.def("set_debug(bool on) -> bool");
    m.def("debug_flag() -> int");

    // Writes k, v [B, Q, Hkv, D] into the pool from position start [B] on.
    m.def(
        "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table, Tensor start) "
        "-> ()");

    // Exact attention of q [B, Q, H, D] over [0, S): out like q, lse [B, H, Q] float32, natural log.
    m.def(
        "block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, *, "
        "int max_seq_len, float? softmax_scale=None, Tensor? kv_lens=None, int split_tokens=0) -> (Tensor out, "
        "Tensor lse)");
    m.def(
        "block_attention_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
        "Tensor(a!) out, Tensor(b!) lse, Tensor(c!) workspace, *, int max_seq_len, float? softmax_scale=None, "
        "Tensor? kv_lens=None, int split_tokens=0) -> ()");
    m.def(
        "block_attention_workspace(int batch, int q_len, int num_heads, int num_kv_heads, int head_dim, "
        "int max_seq_len, int split_tokens=0) -> int");

    // The same, and mass [B, Hkv, n] float32: the softmax share of each unit of g tokens, combined over the rows.
    m.def(
        "block_attention_mass(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, *, "
        "int max_seq_len, int g=64, str score=\"mean\", Tensor? row_mask=None, str norm=\"context\", "
        "Tensor? prefix_lens=None, float? softmax_scale=None, Tensor? kv_lens=None, int split_tokens=0) "
        "-> (Tensor out, Tensor lse, Tensor mass)");
    m.def(
        "block_attention_mass_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
        "Tensor(a!) out, Tensor(b!) lse, Tensor(c!) mass, Tensor(d!) workspace, *, int max_seq_len, int g=64, "
        "str score=\"mean\", Tensor? row_mask=None, str norm=\"context\", Tensor? prefix_lens=None, "
        "float? softmax_scale=None, Tensor? kv_lens=None, int split_tokens=0) -> ()");
    m.def(
        "block_attention_mass_workspace(int batch, int q_len, int num_heads, int num_kv_heads, int head_dim, "
        "int max_seq_len, int g=64, int split_tokens=0) -> int");

    // The same, and row_mass [B, Hkv, n, R] float32: natural log of each row's share of each unit.
    m.def(
        "block_attention_rows(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, *, "
        "int max_seq_len, int g=64, float? softmax_scale=None, Tensor? kv_lens=None, int split_tokens=0) "
        "-> (Tensor out, Tensor lse, Tensor row_mass)");
    m.def(
        "block_attention_rows_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
        "Tensor(a!) out, Tensor(b!) lse, Tensor(c!) row_mass, Tensor(d!) workspace, *, int max_seq_len, "
        "int g=64, float? softmax_scale=None, Tensor? kv_lens=None, int split_tokens=0) -> ()");
    m.def(
        "block_attention_rows_workspace(int batch, int q_len, int num_heads, int num_kv_heads, int head_dim, "
        "int max_seq_len, int g=64, int split_tokens=0) -> int");

    // Exact mass per token from q, K and the known lse, over everything or over the listed units.
    m.def(
        "token_mass(Tensor q, Tensor k_cache, Tensor block_table, Tensor seq_lens, Tensor lse, *, "
        "int max_seq_len, str score=\"mean\", Tensor? row_mask=None, str norm=\"context\", "
        "Tensor? prefix_lens=None, Tensor? units=None, int g=1, float? softmax_scale=None, Tensor? kv_lens=None) "
        "-> Tensor mass");
    m.def(
        "token_mass_out(Tensor q, Tensor k_cache, Tensor block_table, Tensor seq_lens, Tensor lse, "
        "Tensor(a!) mass, Tensor(b!) workspace, *, int max_seq_len, str score=\"mean\", Tensor? row_mask=None, "
        "str norm=\"context\", Tensor? prefix_lens=None, Tensor? units=None, int g=1, float? softmax_scale=None, "
        "Tensor? kv_lens=None) -> ()");
    m.def(
        "token_mass_workspace(int batch, int q_len, int num_heads, int num_kv_heads, int head_dim, "
        "int max_seq_len) -> int");

    // Each row's own top units of row_mass [B, Hkv, n, R]: votes [B, Hkv, n], union size and coverage [B, Hkv].
    m.def(
        "row_votes(Tensor row_mass, Tensor prefix_lens, *, int k, int g, Tensor? row_mask=None) "
        "-> (Tensor votes, Tensor union_size, Tensor coverage)");
    m.def(
        "row_votes_out(Tensor row_mass, Tensor prefix_lens, Tensor(a!) votes, Tensor(b!) union_size, "
        "Tensor(c!) coverage, Tensor(d!) workspace, *, int k, int g, Tensor? row_mask=None) -> ()");
    m.def("row_votes_workspace(int batch, int num_kv_heads, int num_units, int num_rows) -> int");

    // Budgets and top-K of all L layers of a step: indices [L, B, Hkv, capacity], counts, kept_mass, tail_start,
    // overflow.
    m.def(
        "select_kv(Tensor mass, Tensor prefix_lens, *, int g, int capacity, str rule=\"fixed\", int k=0, "
        "int k_min=0, float p=0.0, int sinks=0, int recents=0, Tensor? votes=None, Tensor? union_size=None, "
        "Tensor? coverage=None) -> (Tensor indices, Tensor counts, Tensor kept_mass, Tensor tail_start, "
        "Tensor overflow)");
    m.def(
        "select_kv_out(Tensor mass, Tensor prefix_lens, Tensor(a!) indices, Tensor(b!) counts, "
        "Tensor(c!) kept_mass, Tensor(d!) tail_start, Tensor(e!) overflow, Tensor(f!) workspace, *, int g, "
        "int capacity, str rule=\"fixed\", int k=0, int k_min=0, float p=0.0, int sinks=0, int recents=0, "
        "Tensor? votes=None, Tensor? union_size=None, Tensor? coverage=None) -> ()");
    m.def("select_kv_workspace(int num_layers, int batch, int num_kv_heads, int num_units, int capacity) -> int");

    // Attention over the listed units below tail_start and over [tail_start, S).
    m.def(
        "sparse_block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
        "Tensor indices, Tensor counts, Tensor tail_start, *, int g, int max_seq_len, float? softmax_scale=None, "
        "Tensor? kv_lens=None, int split_tokens=0) -> (Tensor out, Tensor lse)");
    m.def(
        "sparse_block_attention_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
        "Tensor seq_lens, Tensor indices, Tensor counts, Tensor tail_start, Tensor(a!) out, Tensor(b!) lse, "
        "Tensor(c!) workspace, *, int g, int max_seq_len, float? softmax_scale=None, Tensor? kv_lens=None, "
        "int split_tokens=0) -> ()");
    m.def(
        "sparse_block_attention_workspace(int batch, int q_len, int num_heads, int num_kv_heads, int head_dim, "
        "int max_seq_len, int g, int capacity, int split_tokens=0) -> int");

    // Merges partial attentions: outs [B, Q, H, D], lses [B, H, Q].
    m.def(
        "merge_attention(Tensor[] outs, Tensor[] lses, *, bool log2_in=False, bool log2_out=False) "
        "-> (Tensor out, Tensor lse)");
    m.def(
        "merge_attention_out(Tensor[] outs, Tensor[] lses, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) workspace, "
        "*, bool log2_in=False, bool log2_out=False) -> ()");
    m.def("merge_attention_workspace(int num_parts, int batch, int q_len, int num_heads, int head_dim) -> int");

    // One pass over logits [N, V]: argmax, its probability, entropy in nats.
    m.def("token_confidence(Tensor logits) -> (Tensor token, Tensor prob, Tensor entropy)");
    m.def(
        "token_confidence_out(Tensor logits, Tensor(a!) token, Tensor(b!) prob, Tensor(c!) entropy, "
        "Tensor(d!) workspace) -> ()");
    m.def("token_confidence_workspace(int num_rows, int vocab_size) -> int");
}

// Ops without a tensor have no backend to dispatch on; their kernels go here and to MAGE_HOST_IMPL of <op>.cpp.
MAGE_HOST_IMPL(m) { m.impl("set_num_threads", TORCH_BOX(&set_num_threads)); }
