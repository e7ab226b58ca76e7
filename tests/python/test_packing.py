"""Packed two-stream rows: who sees whom, what is masked, what is predicted, and that a packed row computes what the
denoising loop computes at inference. Run: pytest tests/python/test_packing.py
"""

import numpy as np
import pytest
import torch

from mage_ext.testing.tiny import tiny_config, tiny_model
from mage_ext.train.packing import ANSWER, CLEAN, PROSE, Branch, Layout, dense_mask, pack, visible

BLOCK = 8
LAYOUT = Layout(trunk=5 * BLOCK, branches=3, branch_tokens=4 * BLOCK, branch_blocks=2, trunk_blocks=3, block=BLOCK)
MASK, END = 1, 2
CONFIG = tiny_config("llama_shift", block_size=BLOCK, vocab_size=60, mask_id=MASK, num_layers=2)


def row(rng, trunk_tokens, branches):
    """Random tokens; branches: (tokens, answer_start) each."""

    def draw(count):
        return rng.integers(3, 60, count).tolist()

    return draw(trunk_tokens), [Branch(draw(count), answer_start) for count, answer_start in branches]


ROWS = [
    (5 * BLOCK, [(20, 12), (17, 16), (32, 20)]),  # an answer over two blocks, one that starts a block, one to the end
    (
        3 * BLOCK + 5,
        [(9, 3)],
    ),  # a shorter trunk, cut to whole blocks; an answer that starts in the branch's first block
    (BLOCK, []),  # no block of the trunk has a block before it
]


@pytest.fixture
def made():
    """Texts of ROWS and their batch."""
    rng = np.random.default_rng(0)
    texts = [row(rng, *description) for description in ROWS]
    batch = pack(np.random.default_rng(1), LAYOUT, [t for t, _ in texts], [b for _, b in texts], MASK, END)
    return texts, batch


def copies(batch, number):
    """(copy, its slice of row `number`) in the order of the row."""
    noisy = batch.noisy[number]
    for copy in range(1, int(noisy.max()) + 1):
        (at,) = torch.nonzero(noisy == copy, as_tuple=True)
        assert at.tolist() == list(range(int(at[0]), int(at[0]) + BLOCK))
        yield copy, slice(int(at[0]), int(at[0]) + BLOCK)


def clean_text(batch, number, branch):
    """Clean tokens of the trunk followed by those of a branch (0: the trunk alone)."""
    clean = batch.noisy[number] == 0
    parts = [batch.tokens[number][clean & (batch.branch[number] == b)] for b in ([0, branch] if branch else [0])]
    return torch.cat(parts)


# --- the rule of what sees what -------------------------------------------------------------------------------------


def test_visible_is_the_statement_of_the_docstring():
    """All pairs of (branch, copy, block), decided by words."""
    kinds = [(branch, copy, block) for branch in (0, 1, 2) for copy in (0, 1, 2, 3) for block in range(4)]
    for q_branch, q_copy, q_block in kinds:
        for k_branch, k_copy, k_block in kinds:
            if k_copy:  # a noisy token is seen by its own copy alone
                expected = q_copy == k_copy
            elif k_branch not in (0, q_branch):  # a branch does not see other branches
                expected = False
            elif q_copy:  # a copy sees the clean blocks before its own
                expected = k_block < q_block
            else:  # clean text is block-causal
                expected = k_block <= q_block
            asked = map(torch.tensor, (q_branch, q_copy, q_block, k_branch, k_copy, k_block))
            assert bool(visible(*asked)) == expected


def test_dense_mask_row_by_row(made):
    _, batch = made
    mask = dense_mask(batch, BLOCK)
    assert mask.shape == (3, 1, LAYOUT.tokens, LAYOUT.tokens) and mask.dtype == torch.bool
    assert mask.any(-1).all()  # softmax of nothing would be NaN
    padding = batch.branch < 0
    real = ~padding
    assert padding.any() and not (mask[:, 0] & real[:, :, None] & padding[:, None, :]).any()
    for number in range(3):
        for copy, here in copies(batch, number):
            seen = mask[number, 0, here]
            branch, first = int(batch.branch[number, here][0]), int(batch.positions[number, here][0])
            assert torch.equal(seen, seen[:1].expand_as(seen))  # all rows of a copy see the same
            tokens = batch.tokens[number][seen[0] & (batch.noisy[number] == 0)]
            assert torch.equal(tokens, clean_text(batch, number, branch)[:first])
            assert (seen[0] & (batch.noisy[number] > 0)).nonzero()[:, 0].tolist() == list(range(LAYOUT.tokens))[here]
            assert copy == int(batch.noisy[number, here][0])


# --- what is packed -------------------------------------------------------------------------------------------------


def test_clean_parts_hold_the_texts(made):
    texts, batch = made
    assert batch.tokens.shape == (3, LAYOUT.tokens) and LAYOUT.tokens % 128 == 0
    for number, (trunk, branches) in enumerate(texts):
        whole = len(trunk) // BLOCK * BLOCK
        assert clean_text(batch, number, 0).tolist() == trunk[:whole]
        for j, branch in enumerate(branches, 1):
            filled = -len(branch.tokens) % BLOCK
            expected = [*trunk[:whole], *branch.tokens, *[END] * filled]
            assert clean_text(batch, number, j).tolist() == expected
            clean = (batch.noisy[number] == 0) & (batch.branch[number] == j)
            assert batch.positions[number][clean].tolist() == list(range(whole, len(expected)))
        assert int(batch.branch[number].max()) == len(branches)


def test_copies_are_complementary_pairs(made):
    """Each maskable token is masked in exactly one copy of its pair, no other token in any, and the rest is clean."""
    texts, batch = made
    for number, (_, branches) in enumerate(texts):
        pairs = list(copies(batch, number))
        assert len(pairs) % 2 == 0
        for (_, one), (_, two) in zip(pairs[::2], pairs[1::2], strict=True):
            branch, first = int(batch.branch[number, one][0]), int(batch.positions[number, one][0])
            for half in (one, two):
                assert batch.positions[number, half].tolist() == list(range(first, first + BLOCK))
                assert (batch.branch[number, half] == branch).all() and first % BLOCK == 0 and first > 0
            truth = clean_text(batch, number, branch)[first : first + BLOCK]
            start = len(clean_text(batch, number, 0)) + branches[branch - 1].answer_start if branch else 0
            maskable = (torch.arange(first, first + BLOCK) >= start) & (torch.arange(BLOCK) > 0)
            masked = torch.stack([batch.tokens[number, half] == MASK for half in (one, two)])
            assert torch.equal(masked.sum(0) == 1, maskable) and not (masked.sum(0) > 1).any()
            for half, hidden in zip((one, two), masked, strict=True):
                assert torch.equal(batch.tokens[number, half][~hidden], truth[~hidden])


def test_every_answer_block_and_so_many_trunk_blocks_are_noised(made):
    _, batch = made
    expected = [
        (3, {1: 2, 2: 1, 3: 2}),
        (2, {1: 2}),
        (0, {}),
    ]  # blocks 1 and 2 of a trunk of three have one before them
    for number, (of_trunk, of_branch) in enumerate(expected):
        firsts = {
            (int(batch.branch[number, at][0]), int(batch.positions[number, at][0])) for _, at in copies(batch, number)
        }
        owners = [branch for branch, _ in firsts]
        assert owners.count(0) == of_trunk and {b: owners.count(b) for b in owners if b} == of_branch


def test_targets_under_the_token_shift(made):
    """Position i is read at i - 1: of the same copy, or for a block's first token at the clean token before it."""
    texts, batch = made
    seen = set()
    for source, target, kind, at in zip(
        batch.source.tolist(), batch.target.tolist(), batch.kind.tolist(), batch.target_at.tolist(), strict=True
    ):
        (number, read), (same, put) = source, at
        assert number == same and put == read + 1 and tuple(at) not in seen
        seen.add(tuple(at))
        branch, position = int(batch.branch[number, put]), int(batch.positions[number, put])
        assert int(batch.branch[number, read]) == branch and int(batch.positions[number, read]) == position - 1
        assert int(batch.noisy[number, read]) == int(batch.noisy[number, put])
        assert target == int(clean_text(batch, number, branch)[position])
        assert kind == (CLEAN if not branch and not batch.noisy[number, put] else ANSWER if branch else PROSE)
        if batch.noisy[number, put]:
            assert int(batch.tokens[number, put]) == MASK
        else:
            assert position % BLOCK == 0 and int(batch.tokens[number, put]) == target
    # Nothing is left out: every mask, every first token of the trunk's blocks but the first, every first answer token.
    masks = {(r, i) for r, i in torch.nonzero((batch.tokens == MASK) & (batch.noisy > 0)).tolist()}
    firsts = {(r, i) for r, (t, _) in enumerate(texts) for i in range(BLOCK, len(t) // BLOCK * BLOCK, BLOCK)}
    answers = set()
    for number, (_, branches) in enumerate(texts):
        for j, branch in enumerate(branches):
            begin = LAYOUT.trunk + j * LAYOUT.branch_tokens
            places = range(branch.answer_start, len(branch.tokens))
            answers |= {(number, begin + i) for i in places if i % BLOCK == 0 and i}
    assert seen == masks | firsts | answers and len(answers) >= 3


def test_all_masked_is_the_start_of_a_block():
    rng = np.random.default_rng(0)
    texts = [row(rng, *description) for description in ROWS]
    batch = pack(
        np.random.default_rng(1), LAYOUT, [t for t, _ in texts], [b for _, b in texts], MASK, END, all_masked=True
    )
    for number in range(3):
        for copy, here in copies(batch, number):
            branch, first = int(batch.branch[number, here][0]), int(batch.positions[number, here][0])
            answer = texts[number][1][branch - 1].answer_start + len(clean_text(batch, number, 0)) if branch else 0
            expected = [copy % 2 == 1 and first + i >= answer and i > 0 for i in range(BLOCK)]
            assert (batch.tokens[number, here] == MASK).tolist() == expected


def test_share_of_masks_is_uniform():
    """Over many pairs the first copy's share of masked tokens has the mean and variance of (Binomial(n, U) / n)."""
    layout = Layout(trunk=64 * BLOCK, branches=0, trunk_blocks=63, branch_tokens=BLOCK, block=BLOCK)
    rng = np.random.default_rng(2)
    shares = []
    for seed in range(10):
        batch = pack(np.random.default_rng(seed), layout, [rng.integers(3, 60, layout.trunk)], [[]], MASK, END)
        masked = (batch.tokens[0] == MASK)[layout.clean : layout.clean + 126 * BLOCK].view(63, 2, BLOCK)
        assert (masked.sum((1, 2)) == BLOCK - 1).all()
        shares += (masked[:, 0].sum(-1) / (BLOCK - 1)).tolist()
    shares = np.array(shares)
    n = BLOCK - 1
    variance = 1 / 12 + 1 / (6 * n)  # of U, and the mean of U (1 - U) / n
    assert abs(shares.mean() - 0.5) < 4 * (variance / len(shares)) ** 0.5
    assert abs(shares.var() - variance) < 0.15 * variance


def test_pack_is_a_function_of_its_seed(made):
    texts, batch = made
    again = pack(np.random.default_rng(1), LAYOUT, [t for t, _ in texts], [b for _, b in texts], MASK, END)
    other = pack(np.random.default_rng(2), LAYOUT, [t for t, _ in texts], [b for _, b in texts], MASK, END)
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(batch).items())
    assert not torch.equal(batch.tokens, other.tokens)


# --- the packing computes what the loop computes --------------------------------------------------------------------


def attention(mask):
    def attend(layer, q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def loop_logits(model, text, block):
    """What a denoising forward gives: clean blocks, block-causal, then one block that sees them and itself."""
    tokens = torch.cat((text, block))[None]
    number = torch.arange(tokens.shape[1]) // BLOCK
    return model(tokens, torch.arange(tokens.shape[1])[None], attention(number[:, None] >= number[None]))[0]


def test_packed_logits_are_those_of_the_loop(made):
    """For each noisy copy: a forward of [clean blocks before | noisy block] and nothing else."""
    _, batch = made
    model, wide = tiny_model(CONFIG), tiny_model(CONFIG).double()
    packed = model(batch.tokens, batch.positions, attention(dense_mask(batch, BLOCK)))
    exact = wide(batch.tokens, batch.positions, attention(dense_mask(batch, BLOCK)))
    assert exact.std() > 0.3
    compared, error, rounding = 0, 0.0, 0.0
    for number in range(3):
        for _, here in copies(batch, number):
            branch, first = int(batch.branch[number, here][0]), int(batch.positions[number, here][0])
            text = clean_text(batch, number, branch)[:first]
            plain = loop_logits(wide, text, batch.tokens[number, here])
            error = max(error, float((plain[-BLOCK:] - exact[number, here]).abs().max()))
            # The clean text before it too: its last row is what predicts the block's first token.
            clean = (batch.noisy[number] == 0) & ((batch.branch[number] == 0) | (batch.branch[number] == branch))
            error = max(error, float((plain[:first] - exact[number][clean][:first]).abs().max()))
            rounding = max(rounding, float((packed[number, here] - exact[number, here]).abs().max()))
            compared += 1
    # Angles and norms are float32 even in the wide model, so its agreement is between float64's and the rounding of
    # the float32 model, which is the scale.
    assert compared == 24
    assert error <= rounding / 2 and rounding < 1e-3


def test_packed_logits_do_see_the_context(made):
    """The comparison above has teeth: a changed trunk token changes the logits of the blocks behind it, of no other."""
    _, batch = made
    model = tiny_model(CONFIG)
    before = model(batch.tokens, batch.positions, attention(dense_mask(batch, BLOCK)))
    changed = batch.tokens.clone()
    changed[0, 2 * BLOCK + 3] = 3 + (changed[0, 2 * BLOCK + 3] - 2) % 57
    after = model(changed, batch.positions, attention(dense_mask(batch, BLOCK)))
    for _, here in copies(batch, 0):
        branch, first = int(batch.branch[0, here][0]), int(batch.positions[0, here][0])
        moved = float((after[0, here] - before[0, here]).abs().max())
        assert (moved > 1e-3) if first > 2 * BLOCK else (moved == 0.0), (branch, first, moved)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(trunk=33), r"trunk must be a multiple of block \(32\), got 33"),
        (dict(branch_tokens=48), r"branch_tokens must be a multiple of block \(32\), got 48"),
        (dict(branches=-1), "branches must be an integer of at least 0, got -1"),
        (dict(block=1), "block must be an integer of at least 2, got 1"),
        (dict(trunk=64.0), "trunk must be an integer of at least 1, got 64.0"),
        (dict(trunk_blocks=-2), "trunk_blocks must be an integer of at least 0, got -2"),
    ],
)
def test_layout_refuses(sizes, message):
    with pytest.raises(ValueError, match=f"Layout: {message}"):
        Layout(**{**dict(trunk=64, branches=1), **sizes})


@pytest.mark.parametrize(
    "branches, message",
    [
        ([Branch([5] * 9, 4)] * 4, "branches must be at most 3 per row, got 4"),
        (
            [Branch([5] * 33, 30)],
            "a branch must fit 32 tokens, its answer 2 blocks, got 33 tokens with the answer from 30",
        ),
        (
            [Branch([5] * 32, 15)],
            "a branch must fit 32 tokens, its answer 2 blocks, got 32 tokens with the answer from 15",
        ),
        ([Branch([5] * 9, 9)], r"answer_start of a branch must be in \[0, 9\), got 9"),
        ([Branch([], 0)], r"answer_start of a branch must be in \[0, 0\), got 0"),
    ],
)
def test_pack_refuses(branches, message):
    with pytest.raises(ValueError, match=f"pack: {message}"):
        pack(np.random.default_rng(0), LAYOUT, [[5] * 40], [branches], MASK, END)


def test_pack_refuses_rows_without_branches():
    with pytest.raises(ValueError, match="pack: branches must have an entry for each of 2 trunks, got 1"):
        pack(np.random.default_rng(0), LAYOUT, [[5] * 40] * 2, [[]], MASK, END)
