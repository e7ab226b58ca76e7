"""How far the first forward of a block foretells the attention of the later ones: recall, kept mass, queries, budgets.

Blocks are those that exact generation writes; every forward of them is done once more, with the attention of every row
looked at. Rows of `mage eval recall` (eval/recall.json). All have

    study                "recall", "alignment" or "budget"
    task, tokens         "prose" (held-out text is continued) or a task of method_comparison; tokens of a prompt, about
    control              "none"; "base": the weights before the adapter; "shuffled": entries of each matrix permuted
    n, blocks            contexts, and the blocks of them that count
    T, prefix_tokens     forwards of a whole open block; mean prefix
    x                    share of the block's open positions that is decided, one per forward that the lists are of: the
                         second forward of the block first, the finished block (x = 1) last

study "recall", one row per method, K and g; lists of the first forward unless it says otherwise, against the list that
each later forward would make by its mean mass over the rows open at the start:

    method               mage (mean, open rows, norm context), mage_max, mage_all, mage_prefix, probe1, probe5 (one or
                         five rows), v1 (votes, budgets by layer; g = 1), carry (mage's of the block before), tidal and
                         quest (lists of the later forward itself), recency, random, oracle (the later forward's own)
    K, g, chance         chance: K / prefix, what random lists share
    score, ci_low, ci_high      mean recall over layers, heads, blocks and later forwards; interval over contexts
    exact                1.0, the oracle's
    recall_worst_layer, recall_p5      least mean of a layer; 5th percentile over (layer, head, block)
    kept, kept_worst_layer, kept_p5    mass that is attended as a share of what the own list attends
    kept_mass, own_mass  the two masses of that share, means
    recall_by_forward, kept_by_forward      along x
    recall_by_layer, kept_by_layer          layers from the first on

study "alignment", cosine of the block's mean query of a later forward with that of the first:

    method               "rotated" (as it meets the keys) or "unrotated" (before the rotary embedding)
    score, ci_low, ci_high, exact      mean over layers, heads, blocks, forwards; exact 1.0
    cosine_by_forward, cosine_by_layer
    next_block, next_block_by_layer    control: first forward of the next block instead; None with one block
    other_text           control: first forward of another context; None with one context

study "budget", what each layer wants:

    method               "v1_score": max over heads of |U| (1 - ln coverage), with K; "tokens": prefix tokens that are
                         needed for the share p of the mass, with p, mean over heads
    x                    here from the first forward (x = 0) on
    by_forward_layer     [forwards][layers], means
    spearman             rank correlation over layers of each later forward with the first
    score                mean of spearman; spearman_contexts: the same of single contexts, mean

Test: pytest tests/python/test_attention_study.py
"""
