#pragma once

#include "mage/stream.h"
#include "mage/types.h"

// select_kv: budgets and top units of all layers of a step, from the mass that exact attention emitted.
//
// Per request b, with P = prefix_lens[b] clamped to [0, n * g]:
//   tail_start[b] = P / g * g; the units [0, E), E = P / g, can be listed; everything from tail_start on is attended
//                   anyway.
//   A budget of K tokens lists K / g units, one fewer if P % g != 0 (the partial unit is charged), never fewer than 0.
//   First come the forced units, as far as the budget reaches: those that intersect [0, sinks), lowest first, then
//   those below tail_start that intersect [P - recents, P), latest first. The rest follows by rank.
// Rank by mass: larger first, compared as float bits; zero and negative masses are equal; NaN comes last; ties to the
// lowest unit.
//
// Rules:
//   kFixed  K = k for every layer and KV head.
//   kLayer  (MAGE v1) per layer l and request b: s_l = max_h union_size_h * (1 - ln coverage_h), coverage clamped to
//           [2^-24, 1] (NaN: 2^-24), 1 - ln rounded to a multiple of 2^-20; K_l = max(k_min, floor(s_l / sum_l s_l * k
//           / g * L) * g). If every s_l is 0, K_l = max(k_min, k). Rank by votes, ties to the lowest unit; units
//           without votes follow, the most recent first.
//   kMass   the fewest units with which the kept mass reaches p of the total, at least k_min / g (less the partial
//           unit); all forced ones are in.
//   kJoint  the Hkv heads of a layer and request share Hkv * (units of K = k): forced ones per head first (cut to the
//           head's own share), then one ranking over all heads by mass, ties to the lowest unit, then to the lowest
//           head.
//
// A list that would be longer than `capacity` keeps its first `capacity` units in the order above and sets overflow.
//
// Sums are integers: every mass, clamped to [0, 1] (NaN: 0), times 2^40, rounded down. So a uniform mass over 2^20
// units still has 20 bits, and results are the same bit for bit for any number of threads and on every backend.
// The only function whose last bit a backend chooses is the logarithm of rule layer. Rounded to 2^-20 it is the same
// for every float64 logarithm that errs by at most one unit in the last place, as those of glibc and CUDA do: of all
// float32 coverages in [2^-24, 1], that were all tried, one (0x1.b97c7p-14) comes as near to a tie as 1.1 * 2^-30 of a
// multiple, the next one 1.9 * 2^-27, and for the one both neighbours of its logarithm give the same multiple, too.
//
// Cost: reads mass once from memory (rule mass: up to three more passes from cache), O(L * B * Hkv * n). On a GPU one
// launch, and one read as long as a cluster of multiprocessors holds a row: 760000 units, with rule kJoint and its Hkv
// heads in one cluster 760000 / Hkv, with more than 16 of them nothing. A longer row is read once in each pass, and so
// is one of many long rows of rule kFixed in which too many units are alike, or too few are not zero.
namespace mage {

enum class SelectRule : int32_t { kFixed = 0, kLayer = 1, kMass = 2, kJoint = 3 };

// Units per row of mass. Together with masses of at most 2^40 it keeps every sum below 2^63.
constexpr int64_t kSelectMaxUnits = int64_t{1} << 22;
constexpr int64_t kSelectMaxTokens = int64_t{1} << 30;

struct SelectKvParams {
    int64_t num_layers = 0;    // L
    int64_t num_requests = 0;  // B, >= 0
    int64_t num_kv_heads = 0;  // Hkv
    int64_t num_units = 0;     // n, at most kSelectMaxUnits
    int64_t granularity = 0;   // g: 1, 16, 32 or 64
    int64_t capacity = 0;      // Kmax, units, 1 to kSelectMaxUnits

    SelectRule rule = SelectRule::kFixed;
    int64_t k = 0;        // tokens, multiple of g, 0 to kSelectMaxTokens
    int64_t k_min = 0;    // like k; kLayer and kMass
    double p = 0.0;       // (0, 1]; kMass
    int64_t sinks = 0;    // tokens, 0 to kSelectMaxTokens
    int64_t recents = 0;  // tokens, 0 to kSelectMaxTokens

    const float* mass = nullptr;  // [L, B, Hkv, n], last stride 1
    int64_t stride_mass_layer = 0;
    int64_t stride_mass_request = 0;
    int64_t stride_mass_head = 0;
    const int32_t* prefix_lens = nullptr;  // [B]

    // kLayer only, as row_votes gives them per layer.
    const int32_t* votes = nullptr;       // [L, B, Hkv, n], contiguous
    const int32_t* union_size = nullptr;  // [L, B, Hkv], contiguous, units
    const float* coverage = nullptr;      // [L, B, Hkv], contiguous

    // Outputs, contiguous.
    int32_t* indices = nullptr;     // [L, B, Hkv, Kmax]; strictly ascending unit numbers, -1 after the count
    int32_t* counts = nullptr;      // [L, B, Hkv]
    float* kept_mass = nullptr;     // [L, B, Hkv]; mass of the listed units and of all units from tail_start on
    int32_t* tail_start = nullptr;  // [B]
    bool* overflow = nullptr;       // [L, B, Hkv]
};

// Bytes of workspace, for every backend the same. NOTE: 0 today, no backend needs any; callers ask nevertheless.
int64_t select_kv_workspace(int64_t num_layers, int64_t num_requests, int64_t num_kv_heads, int64_t num_units,
                            int64_t capacity);

// Throws mage::Error if a dimension or a budget does not hold. Backends call it; a binding calls it before it
// allocates.
void check_select_kv(const SelectKvParams& params);

namespace cpu {

// Throws mage::Error if an argument does not hold. Reads and writes nothing outside the arrays, whatever their values.
void select_kv(const SelectKvParams& params);

}  // namespace cpu

namespace cuda {

// Asynchronous on `stream`, one launch; allocates nothing; can be captured in a graph, which then follows new masses,
// lengths and votes. Throws mage::Error if an argument does not hold, or if rule kJoint has more than 2^32 / n heads,
// rounded down to a power of two.
void select_kv(const SelectKvParams& params, CudaStream stream);

}  // namespace cuda
}  // namespace mage
