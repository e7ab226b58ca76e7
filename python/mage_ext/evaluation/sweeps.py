"""Accuracy over the depth of a fact and over the threshold of the sampler.

Rows of `mage eval heatmap` (eval/heatmap.json) are those of eval/methods.json without recall, one per method, length
and depth:

    task "needle", method, K, g, dense_layers, n, score, exact, ci_low, ci_high, kv_share, forwards, ...
    tokens               of the prompt, about; prefix_tokens: mean prefix before the first block
    depth                where the fact stands, 0 = start of the context, 1 = end

Rows of `mage eval thresholds` (eval/thresholds.json), one per method and threshold:

    task, method, K, g, dense_layers, n, score, exact, ci_low, ci_high, kv_share, ...   as in eval/methods.json
    threshold            of the sampler low_confidence_dynamic
    forwards             mean per answer, commits included; exact_forwards: of exact at this threshold
    tokens_per_forward   new tokens per forward, mean over answers
    forwards_ratio, forwards_ratio_low, forwards_ratio_high    forwards / exact_forwards, interval over cases

Test: pytest tests/python/test_sweeps.py
"""
