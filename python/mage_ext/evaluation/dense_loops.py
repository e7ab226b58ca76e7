"""Dense loops to hold the denoising loop against: one token per forward, and Fast-dLLM v2's loop as it is published.

`autoregressive` has what the denoising loop has, the paged cache, the attention kernel and a CUDA graph, so that block
diffusion is compared with the best that one token per forward can do. `published_loop` has none of it: plain eager
torch, K and V of the context concatenated with the block's in every layer of every forward.

Test: pytest tests/python/test_baselines.py
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mage_ext import sampling
from mage_ext._arguments import check_list, check_type, got
from mage_ext._upload import upload
from mage_ext.cache import RaggedBatch
from mage_ext.denoise import DenoiseConfig, StepGraphs
from mage_ext.models.transformer import Attend, Transformer, rotary
from mage_ext.paged_forward import PagedForward, Write
from mage_ext.prefill import check_cache, check_ids

# --- one token per forward -------------------------------------------------------------------------------------------


class _TextSlots:
    """Tensors of A requests that write one token per forward, in place so that a graph may read them.

    Fields:
        tokens: [A, bound + 1], int64, by position; what is not known yet is 0. length: [A], int64, tokens whose K and V
            are in the cache; the next forward takes the token at that position. block_table: [A, pages], int32.
    """

    def __init__(self, num_requests: int, bound: int, num_pages: int, device: torch.device):
        self.tokens = torch.zeros(num_requests, bound + 1, dtype=torch.int64, device=device)
        self.length = torch.zeros(num_requests, dtype=torch.int64, device=device)
        self.block_table = torch.full((num_requests, num_pages), -1, dtype=torch.int32, device=device)


@torch.no_grad()
def causal_prefill(
    model: Transformer, batch: RaggedBatch, prompts: Sequence[Sequence[int]], *, chunk: int = 512
) -> tuple[list[int], list[int]]:
    """Writes K and V of all tokens of every prompt but the last, each attending those up to itself.

    Args:
        model: a Transformer. batch: A requests, without tokens; it takes the pages that it needs.
        prompts: A lists of token ids, none empty. chunk: tokens per forward.
    Returns:
        lengths: K/V tokens in the cache, and tokens: the last of every prompt, as `autoregressive` takes them.
    Raises:
        ValueError, TypeError: naming the argument. OutOfPages: the cache has no pages for a prompt.
    """
    _check_batch("causal_prefill", model, batch)
    prompts = check_list("causal_prefill", "prompts", prompts, "a list of lists of token ids")
    if len(prompts) != len(batch) or not all(prompts):
        raise ValueError(f"causal_prefill: prompts must be {len(batch)} lists that are not empty, got {len(prompts)}")
    prompts = [check_list("causal_prefill", f"prompts[{i}]", p, "a list of token ids") for i, p in enumerate(prompts)]
    for i, prompt in enumerate(prompts):
        check_ids("causal_prefill", f"prompts[{i}]", prompt, model.config.vocab_size)
        if len(prompt) > model.config.max_positions:
            raise ValueError(
                f"causal_prefill: prompts[{i}] must fit the model's {model.config.max_positions} positions, got "
                f"{len(prompt)} tokens"
            )
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"causal_prefill: chunk must be an integer >= 1, got {got(chunk)}")
    device = batch.cache.device
    lengths = [len(prompt) - 1 for prompt in prompts]
    for request, prompt in enumerate(prompts):
        batch.reserve(request, len(prompt))
    for begin in range(0, max(lengths), chunk):
        width = min(chunk, max(lengths) - begin)
        ends = [min(max(length, begin), begin + width) for length in lengths]
        rows = [p[begin:end] + [0] * (begin + width - end) for p, end in zip(map(list, prompts), ends, strict=True)]
        positions = torch.arange(begin, begin + width, device=device).expand(len(batch), -1)
        start = torch.full((len(batch),), begin, dtype=torch.int32, device=device)
        forward = PagedForward(
            batch.cache,
            batch.block_table,
            begin + width,
            [Write(start)],
            upload([end if end > begin else 0 for end in ends], device, torch.int32),
            kv_lens=(positions + 1).int().contiguous(),
        )
        model.hidden(upload(rows, device), positions, forward)
    return lengths, [prompt[-1] for prompt in prompts]


@torch.no_grad()
def autoregressive(
    model: Transformer,
    batch: RaggedBatch,
    lengths: Sequence[int],
    tokens: Sequence[int],
    num_tokens: int,
    *,
    graphs: StepGraphs | None = None,
    cuda_graphs: bool = True,
) -> Tensor:
    """Greedy decoding of one token per forward: a forward of one row per request over everything before it.

    A forward writes its token's K and V to the paged cache, attends them and all before by `block_attention` and takes
    the most probable token (never the mask id, as in the denoising loop). On CUDA a forward with its head and choice is
    one graph; nothing waits for the device between the tokens.

    Args:
        model: a Transformer. batch: A requests; it takes the pages that it lacks.
        lengths: A integers >= 0, K/V tokens of each request in the cache, of `causal_prefill` or random.
        tokens: A ids, the token at position lengths[a] of each.
        num_tokens: to write after that token, >= 1.
        graphs: CUDA graphs of earlier calls with the same model and cache, to go on with: the first forward with them
            runs as it is, the second captures. None: those of this call.
        cuda_graphs: False launches every kernel anew.
    Returns:
        [A, num_tokens], int64, on the device, which need not be done with it.
    Raises:
        ValueError, TypeError: naming the argument. OutOfPages: the cache has no pages for a request.
    """
    _check_batch("autoregressive", model, batch)
    cache, count, model_config = batch.cache, len(batch), model.config
    for name, values, bound in (
        ("lengths", lengths, model_config.max_positions),
        ("tokens", tokens, model_config.vocab_size),
    ):
        values = check_list("autoregressive", name, values, f"{count} integers")
        if len(values) != count or not all(type(value) is int and 0 <= value < bound for value in values):
            raise ValueError(f"autoregressive: {name} must be {count} integers in [0, {bound}), got {values!r}")
    if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 1:
        raise ValueError(f"autoregressive: num_tokens must be an integer >= 1, got {got(num_tokens)}")
    longest = max(lengths) + num_tokens
    if longest > model_config.max_positions:
        raise ValueError(
            f"autoregressive: lengths and num_tokens must fit the model's {model_config.max_positions} positions, "
            f"got {longest}"
        )
    check_type("autoregressive", "cuda_graphs", cuda_graphs, bool, "a bool")
    if graphs is not None:
        check_type("autoregressive", "graphs", graphs, StepGraphs, "a StepGraphs or None")
    for request, length in enumerate(lengths):
        batch.reserve(request, length + num_tokens)
    graphs = StepGraphs() if graphs is None else graphs
    graphs.bind(model, cache, DenoiseConfig(cuda_graphs=cuda_graphs), longest)
    device, bound = cache.device, graphs.bound
    key = ("autoregressive", count)
    slots = graphs.keep(key, lambda: _TextSlots(count, bound, cache.pages_for(bound), device))
    begin = upload(list(lengths), device, torch.int64)
    slots.length.copy_(begin)
    slots.tokens.scatter_(1, begin[:, None], upload(list(tokens), device, torch.int64)[:, None])
    width = min(slots.block_table.shape[1], batch.block_table.shape[1])
    slots.block_table.fill_(-1)
    slots.block_table[:, :width] = batch.block_table[:, :width]

    def step() -> None:
        position = slots.length[:, None]  # [A, 1]
        start = slots.length.int()
        forward = PagedForward(cache, slots.block_table, bound, [Write(start)], start + 1)
        hidden = model.hidden(slots.tokens.gather(1, position), position, forward)
        drawn = sampling.draw_tokens(model.logits(hidden[:, 0]), mask_id=model_config.mask_id)
        slots.tokens.scatter_(1, position + 1, drawn.token[:, None])
        slots.length.add_(1)

    for _ in range(num_tokens):
        graphs.run(key, step)
    return slots.tokens.gather(1, begin[:, None] + torch.arange(1, num_tokens + 1, device=device))


def _check_batch(owner: str, model: object, batch: object) -> None:
    if not isinstance(model, Transformer):
        raise TypeError(f"{owner}: model must be a Transformer, got {got(model)}")
    check_type(owner, "batch", batch, RaggedBatch, "a RaggedBatch")
    if not len(batch):
        raise ValueError(f"{owner}: batch must have a request, got none")
    check_cache(owner, model, batch.cache)


# --- Fast-dLLM v2's loop as published --------------------------------------------------------------------------------


class ContiguousCache:
    """K and V of one request in one tensor per layer, [1, Hkv, P, D], which every token appended copies: what Hugging
    Face's DynamicCache is.

    Fields:
        keys, values: per layer. Empty before the first block.
    """

    def __init__(self):
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @classmethod
    def random(cls, model: Transformer, num_tokens: int, *, seed: int = 0) -> "ContiguousCache":
        """num_tokens tokens of normal K and V, for speed: such a context needs no prefill.

        Raises:
            ValueError: num_tokens is no multiple of the model's block, < 1 or > 2^30.
        """
        config, weight = model.config, model.embed_tokens.weight
        size = config.block_size
        is_number = isinstance(num_tokens, int) and not isinstance(num_tokens, bool)
        if not is_number or not 1 <= num_tokens <= 1 << 30 or num_tokens % size:
            raise ValueError(
                f"ContiguousCache: num_tokens must be a multiple of the block of {size} in [1, {1 << 30}], got "
                f"{got(num_tokens)}"
            )
        generator = torch.Generator(weight.device).manual_seed(seed)
        shape = (2, 1, config.num_kv_heads, num_tokens, config.head_dim)
        cache = cls()
        for _ in range(config.num_layers):
            k, v = torch.randn(shape, dtype=weight.dtype, device=weight.device, generator=generator)
            cache.keys.append(k)
            cache.values.append(v)
        return cache

    def __len__(self) -> int:
        """P, tokens of the context."""
        return self.keys[0].shape[2] if self.keys else 0

    def check(self, owner: str, model: Transformer) -> None:
        """Raises ValueError where it holds K and V of another kind of model."""
        config = model.config
        expected = (config.num_layers, config.num_kv_heads, config.head_dim)
        found = (len(self.keys), *(self.keys[0].shape[i] for i in (1, 3))) if self.keys else expected
        if found != expected:
            raise ValueError(
                f"{owner}: cache must have the model's layers, KV heads and head_dim {expected}, got {found}"
            )

    def joined(self, layer: int, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """K and V [1, Hkv, P + Q, D] of the context and then k and v [1, Hkv, Q, D]; keep: they are the new context."""
        if layer < len(self.keys):
            k, v = torch.cat((self.keys[layer], k), 2), torch.cat((self.values[layer], v), 2)
        if keep:
            self.keys[layer : layer + 1], self.values[layer : layer + 1] = [k], [v]
        return k, v


def _plain_logits(model: Transformer, tokens: Tensor, cache: ContiguousCache, keep: bool) -> Tensor:
    """Logits [1, Q, V] of tokens [1, Q] after the context: the modules one by one as they are, optimized or not."""
    config, past, count = model.config, len(cache), tokens.shape[1]
    index = torch.arange(past + count)
    mask = index[past:, None] // config.block_size >= index // config.block_size  # made on the host, as published
    mask = mask.to(tokens.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = cache.joined(layer, k.transpose(1, 2), v.transpose(1, 2), keep)
        # With a mask, transformers' "sdpa" repeats K and V of a group instead of enable_gqa.
        group = q.shape[2] // k.shape[1]
        k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
        return scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2).contiguous()

    return model.logits(_plain_hidden(model, tokens, index[past:].to(tokens.device)[None], attend))


def _plain_hidden(model: Transformer, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Transformer.hidden before optimize()."""
    config, x = model.config, model.embed_tokens(tokens)
    cos, sin = rotary(positions, config.head_dim, config.rope_theta, x.dtype)
    for index, layer in enumerate(model.layers):
        x = layer(x, cos, sin, index, attend)
    return model.norm(x)


@torch.no_grad()
def published_prefill(model: Transformer, prompt: Sequence[int]) -> tuple[ContiguousCache, list[int], int]:
    """K and V of the prompt's whole blocks, in one forward with a block-causal mask.

    Returns:
        As `published_loop` takes them: the cache; the tokens known at the start of the first block, which are the
        prompt's tail, or the token that the last logits predict under token shift; how many of these are the prompt's.
    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_type("published_prefill", "model", model, Transformer, "a Transformer")
    prompt = check_list("published_prefill", "prompt", prompt, "a list of token ids")
    config, cache = model.config, ContiguousCache()
    check_ids("published_prefill", "prompt", prompt, config.vocab_size)
    if len(prompt) > config.max_positions:
        raise ValueError(
            f"published_prefill: prompt must fit the model's {config.max_positions} positions, got {len(prompt)} tokens"
        )
    whole = len(prompt) // config.block_size * config.block_size
    if not prompt and config.token_shift:
        raise ValueError("published_prefill: prompt must have at least one token under token shift, got none")
    if not whole:
        return cache, prompt, len(prompt)
    tokens = upload([prompt[:whole]], model.embed_tokens.weight.device)
    logits = _plain_logits(model, tokens, cache, keep=True)
    known = prompt[whole:]
    if config.token_shift and not known:
        return cache, [int(_most_probable(model, logits[:, -1:])[0])], 0
    return cache, known, len(known)


@torch.no_grad()
def published_loop(
    model: Transformer, cache: ContiguousCache, known: Sequence[int], config: DenoiseConfig, *, prompt_tail: int
) -> list[int]:
    """The generation loop that Fast-dLLM v2 publishes with its weights (modeling.py, `generate`), batch 1, no block
    cache.

    As published: eager torch, module by module; in every layer of every forward K and V of the context are concatenated
    with the block's and repeated for the heads of a group, then scaled_dot_product_attention with a boolean mask made
    on the host; logits of the whole block; softmax over them, in their dtype; positions are open where the token is the
    mask id; the host waits for the device in every step to see whether some are left, and looks for the end token; a
    clean block is committed by a forward that appends to the context, after the last block too.
    Ours: the mask id is never drawn; other families' blocks, without token shift or sub-blocks, too; with
    "low_confidence_static" the n most confident are decided, where what is published has a threshold only; a prompt of
    one block is prefilled.

    Args:
        model: a Transformer; optimized or not, its modules run one by one.
        cache: K and V of whole blocks; the loop appends to it.
        known: ids at the start of the first block, fewer than a block, none of them the mask id; at least one under
            token shift.
        config: sampler ("low_confidence_dynamic" or "low_confidence_static", temperature 0), max_new_tokens,
            ignore_eos and sub_block_size are used, and mode must be "exact".
        prompt_tail: how many of `known` are the prompt's; the others are new tokens.
    Returns:
        The new tokens, at most max_new_tokens, EOS included.
    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_type("published_loop", "model", model, Transformer, "a Transformer")
    check_type("published_loop", "cache", cache, ContiguousCache, "a ContiguousCache")
    known = check_list("published_loop", "known", known, "a list of token ids")
    check_type("published_loop", "config", config, DenoiseConfig, "a DenoiseConfig")
    model_config, sampler = model.config, config.sampler
    size, shift, mask_id = model_config.block_size, model_config.token_shift, model_config.mask_id
    sub_size = config.sub_block_size or model_config.sub_block_size or size
    if not shift <= len(known) < size or mask_id in known:
        raise ValueError(
            f"published_loop: known must be at least {int(shift)} and fewer than {size} ids other than the mask id "
            f"{mask_id}, got {known!r}"
        )
    check_ids("published_loop", "known", known, model_config.vocab_size)
    cache.check("published_loop", model)
    check_type("published_loop", "prompt_tail", prompt_tail, int, "an integer")
    if not 0 <= prompt_tail <= len(known):
        raise ValueError(f"published_loop: prompt_tail must be in [0, {len(known)}], got {prompt_tail}")
    static = sampler.name == "low_confidence_static"
    if config.mode != "exact" or config.sub_block_cache or size % sub_size:
        raise ValueError(
            'published_loop: config must be of mode "exact", without sub_block_cache, with sub-blocks that divide '
            f"{size}, got {config.mode!r}, {config.sub_block_cache} and {sub_size}"
        )
    if sampler.temperature or not (static or sampler.name == "low_confidence_dynamic"):
        raise ValueError(
            'published_loop: config.sampler must be "low_confidence_dynamic" or "low_confidence_static" at temperature '
            f"0, got {sampler.name!r} at {sampler.temperature}"
        )
    eos_ids = () if config.ignore_eos else tuple(model_config.eos_ids)
    device = model.embed_tokens.weight.device
    text = upload([known], device, torch.int64)  # of all blocks so far
    while True:
        block = torch.full((1, size), mask_id, dtype=torch.int64, device=device)
        block[:, : text.shape[1] % size] = text[:, text.shape[1] // size * size :]
        text = text[:, : text.shape[1] // size * size]
        for begin in range(0, size, sub_size):
            end = begin + sub_size
            while True:
                is_open = block[:, begin:end] == mask_id
                num_open = int(is_open.sum())  # waits for the device, as published
                if not num_open or _ended(torch.cat((text, block), 1), prompt_tail, mask_id, eos_ids):
                    break
                logits = _plain_logits(model, block, cache, keep=False)
                if shift:
                    logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
                token, confidence = _most_probable(model, logits[:, begin:end])
                confidence = torch.where(is_open, confidence, -math.inf)
                if static:
                    best = confidence.topk(min(sampler.tokens_per_step, num_open), -1).indices
                    decided = torch.zeros_like(is_open).scatter_(1, best, True)
                else:
                    decided = confidence > sampler.threshold
                    decided.scatter_(1, confidence.argmax(-1, keepdim=True), True)
                    decided &= is_open
                block[:, begin:end] = torch.where(decided, token, block[:, begin:end])
        text = torch.cat((text, block), 1)
        end = _ended(text, prompt_tail, mask_id, eos_ids)
        if end:
            return text[0, prompt_tail:end].tolist()[: config.max_new_tokens]
        logits = _plain_logits(model, block, cache, keep=True)
        if text.shape[1] - prompt_tail >= config.max_new_tokens:
            return text[0, prompt_tail:].tolist()[: config.max_new_tokens]
        if shift:
            text = torch.cat((text, _most_probable(model, logits[:, -1:])[0]), 1)


def _most_probable(model: Transformer, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Most probable token [1, n], int64, of logits [1, n, V], and its probability [1, n]."""
    logits = logits.clone()
    logits[..., model.config.mask_id] = -math.inf
    probs = torch.softmax(logits, -1)
    token = probs.argmax(-1)
    return token, probs.gather(-1, token[..., None])[..., 0]


def _ended(text: Tensor, prompt_tail: int, mask_id: int, eos_ids: tuple[int, ...]) -> int:
    """Length of text [1, n] up to its first end token after the prompt, if all before is decided; else 0."""
    if not eos_ids:
        return 0
    new = text[0, prompt_tail:]
    is_eos = torch.isin(new, torch.tensor(eos_ids, device=text.device))
    if not is_eos.any():
        return 0
    first = int(is_eos.nonzero()[0])
    return 0 if (new[:first] == mask_id).any() else prompt_tail + first + 1
