"""Blocks whose tokens are given: what a method's attention costs in language quality, without any sampling noise.

The next 32 tokens of held-out prose are the block; a share t of them is masked, the same positions for all methods, and
one forward predicts them. Rows of `mage eval prose` (eval/prose.json), one per method, setting and t:

    task "prose", method, K, g, dense_layers    as in eval/methods.json
    T                    forwards of a whole open block: what "sparsed" takes a fifth of
    t                    share of the block's open positions that is masked; masked: how many these are
    n, tokens            contexts; tokens of each before the block, which is prefix_tokens, too
    score, ci_low, ci_high      cross entropy of the masked tokens in nats, mean over contexts
    exact                the same of exact attention
    delta, delta_low, delta_high      score - exact, paired by context
    kl, kl_low, kl_high          KL(exact || method) in nats, mean over masked positions
    agreement, agreement_low, agreement_high      share of positions whose most probable token is that of exact
    kept_mass            mean mass that the lists keep of the forward that made them; None where lists change

Intervals are 95 % bootstrap intervals over contexts.

Test: pytest tests/python/test_forced_blocks.py
"""
