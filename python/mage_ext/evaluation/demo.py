"""`mage demo`: a long text with hidden facts, one question for them, and what each way of attending finds.

Test: pytest tests/python/test_needles.py
"""

import time
from collections.abc import Callable, Sequence

from mage_ext.denoise import generate, prefill
from mage_ext.evaluation.needles import CaseMaker, Method, exact_method, sparse_method
from mage_ext.models.huggingface import LoadedModel
from mage_ext.results import check_answered
from mage_ext.sampling import SamplerConfig

BUDGETS = (64, 128, 256)


def demo_methods() -> list[Method]:
    """Exact, MAGE at several K, and the floor: as much of the text, chosen by recency or at random."""
    sampler = SamplerConfig(name="low_confidence_static", tokens_per_step=4)
    floor_k = BUDGETS[len(BUDGETS) // 2]
    return [
        exact_method(sampler),
        *(sparse_method("mage", sampler, k) for k in BUDGETS),
        sparse_method("recency", sampler, floor_k),
        sparse_method("random", sampler, floor_k),
    ]


def run_demo(
    loaded: LoadedModel,
    num_tokens: int,
    seed: int,
    texts: Sequence[tuple[str, str]] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, int]:
    """Runs and prints the comparison.

    Args:
        loaded: the model. num_tokens: length of the prompt. seed: names text, facts and question.
        texts: prose to hide the facts in; None: the project's own. say: takes each line of output.
    Returns:
        Facts found (of four) per method, keyed "exact", "mage 64", ...
    """
    case, ids = CaseMaker(loaded, texts).case(seed, num_tokens, asked=4)
    words = case.context.split()
    say(f"A text of {len(ids)} tokens hides four facts:")
    for fact, depth in zip(case.facts, case.depths, strict=True):
        say(f"  at {100 * depth:3.0f} %  {fact.statement}")
    say(f"It begins: {' '.join(words[:18])} ...")
    say(case.question)
    say("")
    methods = demo_methods()
    state = prefill(loaded.model, [ids], methods[0].config, progress=True)
    block = loaded.config.block_size
    say(f"Prefill, shared by all: {state.prefill_seconds:.1f} s. The answer is one block of {block} tokens.")
    say("Each forward decides 4 of them. MAGE reads everything in the first forward and K tokens per layer and KV head")
    say("in the others (the first 2 layers stay exact). Same size, other choice: recency and random.")
    say("")
    say(f"{'method':<10}{'K':>5}  {'facts':<6}{'answer':<38}{'forwards':>8}  {'KV read':>7}  {'seconds':>7}")
    found = {}
    for method in methods:
        begun = time.perf_counter()
        (result,) = results = generate(loaded.model, state.fork(), method.config, tokenizer=loaded.tokenizer)
        check_answered("demo", results)
        seconds = time.perf_counter() - begun
        right = case.found(result.text)
        lines = (result.text.strip().split("\n") + [""] * 4)[:4]
        shown = " ".join(line if ok else f"({line})" for line, ok in zip(lines, right, strict=True))
        say(
            f"{method.name:<10}{method.K or 'all':>5}  {sum(right)}/{len(right):<4}{shown[:37]:<38}"
            f"{result.stats.num_forwards:>8}  {100 * result.stats.kv_share:>6.1f}%  {seconds:>7.2f}"
        )
        found[f"{method.name} {method.K}".removesuffix(" 0")] = sum(right)
    state.release()
    say("")
    say(
        "Wrong or missing values stand in brackets. KV read is the share of the K/V bytes that exact attention reads in"
    )
    device = "GPU" if loaded.model.embed_tokens.weight.is_cuda else "CPU"
    say(f"all forwards of the answer, the exact first forward included. Seconds are this {device}'s and mostly not")
    say("attention.")
    return found
