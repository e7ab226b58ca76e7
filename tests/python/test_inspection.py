"""What a block reads, and the page that shows it. Run: pytest tests/python/test_inspection.py"""

import dataclasses
import functools
import json
import re

import pytest
import torch

from mage_ext import cli, terminal
from mage_ext.denoise import DenoiseConfig, generate, prefill
from mage_ext.evaluation import inspection, method_comparison, pages
from mage_ext.evaluation.inspection import Inspection, inspect_block, quantise
from mage_ext.models import builtin
from mage_ext.models.huggingface import LoadedModel
from mage_ext.models.tokenizer import Tokenizer, byte_level_bpe
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import SelectionConfig
from mage_ext.testing import browser
from mage_ext.testing.tiny import tiny_config, tiny_model

SAMPLER = SamplerConfig("low_confidence_static", tokens_per_step=2)
ODD = (
    "</script><script>document.title = 'run'</script> \"double\" 'single' & &amp; <b>bold</b>\n\ttab\r\n"
    "flag \U0001f3f3\ufe0f\u200d\U0001f308 emoji \U0001f389 \u05e9\u05dc\u05d5\u05dd \u0639\u0631\u0628\u064a "
    "\u202eturned\u202c "
    "zero\u200bwidth \x00\x1b\x7f\x85 \u2028 line \ufffd end \\ ` ${1} -->"
)


@functools.cache
def _tokenizer():
    """One token per byte of UTF-8, so that characters beyond ASCII take several."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = dict(zip(kept, map(chr, kept), strict=True))
    for byte in range(256):
        spelling.setdefault(byte, chr(256 + len(spelling) - len(kept)))
    return Tokenizer(byte_level_bpe({spelling[byte]: byte for byte in range(256)}, []))


@functools.cache
def _loaded(variant="sdar"):
    config = tiny_config(variant, vocab_size=260, mask_id=259)
    return LoadedModel(config, tiny_model(config, seed=1), _tokenizer())


def _prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(32, 127, (length,), generator=generator).tolist()


def _config(k=16, g=1, mode="mage", dense=(0,), **more):
    chosen = SelectionConfig(k=k, g=g, **more)
    return DenoiseConfig(mode=mode, max_new_tokens=40, sampler=SAMPLER, selection=chosen, dense_layers=dense)


def _run(loaded, prompt, config, block=0):
    """The infos of a block as the loop has it, tensors copied."""
    infos = []

    def keep(info):
        if info.index == block and info.step >= 0:
            names = ("tokens", "open", "decided", "mass")
            copies = {name: None if getattr(info, name) is None else getattr(info, name).clone() for name in names}
            infos.append(dataclasses.replace(info, **copies))

    generate(loaded.model, [prompt], config, callback=keep)
    return infos


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


@pytest.mark.parametrize("variant", ["sdar", "sdar_b16", "llama", "llama_shift", "fast_dllm_v2"])
@pytest.mark.parametrize(
    "config",
    [
        _config(),
        _config(k=32, g=16, dense=()),
        _config(rule="layer", k=8),
        _config(rule="mass", p=0.6),
        _config(score="max", norm="prefix"),
        _config(score_rows="open"),
        _config(candidates=96),
    ],
    ids=["g1", "g16", "layer", "mass", "max", "open", "candidates"],
)
@pytest.mark.parametrize("block", [0, 1])
def test_a_block_is_that_of_the_loop(variant, config, block):
    loaded, prompt = _loaded(variant), _prompt(75)
    infos = _run(loaded, prompt, config, block)
    found = inspect_block(loaded, prompt, config, block=block)
    assert len(found.prefix) == infos[0].starts[0]
    (whole,) = generate(loaded.model, [prompt], config)
    assert (prompt + whole.tokens)[: len(found.prefix)] == found.prefix
    assert found.tokens == infos[-1].tokens[0].tolist()
    assert found.kinds == [info.kind for info in infos]
    for step, info in enumerate(infos):
        decided = [at == step for at in found.decided_at]
        assert decided == info.decided[0].tolist()
    if config.selection.candidates is not None:
        (proven,) = whole.stats.proven[block : block + 1]
        assert found.proven == pytest.approx(proven)
        told = f"out of 96 candidates ({100 * proven:.0f} % of the lists proven)"
        assert told in inspection.page(found, _tokenizer(), {})
        assert terminal.cost_line(whole).endswith(" % of the lists proven")
    lists = infos[-1].selection
    assert found.tail_start == int(lists.tail_start[0]) and len(found.layers) == lists.num_layers
    for index in range(lists.num_layers):
        for head in range(loaded.config.num_kv_heads):
            assert found.lists[index, head].nonzero().flatten().tolist() == lists.units(0, index, head)
    torch.testing.assert_close(found.masses.sum(-1), torch.ones(found.masses.shape[:3]), rtol=0, atol=1e-5)
    chosen = config.selection
    if (chosen.score, chosen.g, chosen.candidates) == ("mean", 1, None) and chosen.rule != "layer":
        for layer, index in found.layers.items():
            assert torch.equal(found.masses[0, layer], infos[0].mass[index, 0, :, : found.masses.shape[-1]])


def test_masses_of_exact_forwards_are_those_of_the_comparison():
    loaded, prompt = _loaded("llama"), _prompt(66)
    config = _config(mode="exact")
    found = inspect_block(loaded, prompt, config)
    state = prefill(loaded.model, [prompt], config)
    masses = method_comparison.exact_masses(loaded.model, state, config, 1)
    assert found.kinds == ["exact"] * len(masses)
    for step, mass in enumerate(masses):
        assert torch.equal(found.masses[step], mass[:, 0, :, : found.masses.shape[-1]])


def test_masses_of_sparse_forwards_are_of_their_own_queries():
    """A sparse forward's mass is measured where the lists have led: with lists of a few tokens it differs from the
    exact run's, with lists of the whole prefix it does not."""
    loaded, prompt = _loaded("llama"), _prompt(66)
    exact = inspect_block(loaded, prompt, _config(mode="exact", k=4))
    narrow = inspect_block(loaded, prompt, _config(k=4, dense=()))
    whole = inspect_block(loaded, prompt, _config(k=64, dense=()))
    assert torch.equal(exact.masses[0], narrow.masses[0])
    assert not torch.equal(exact.masses[1], narrow.masses[1])
    assert whole.kinds[0] == "exact" and torch.equal(exact.masses, whole.masses)


@pytest.mark.parametrize("g, k", [(1, 16), (16, 32)])
def test_kept_mass_of_the_first_forward_is_that_of_the_lists(g, k):
    loaded, prompt, config = _loaded("llama"), _prompt(90), _config(k=k, g=g)
    lists = _run(loaded, prompt, config)[-1].selection
    found = inspect_block(loaded, prompt, config)
    kept, best = found.kept()
    assert (kept[:, 0] == 1).all() and (best[:, 0] == 1).all()  # the dense layer
    torch.testing.assert_close(kept[0, 1:].float(), lists.kept_mass[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(best[0, 1:], kept[0, 1:], rtol=0, atol=1e-5)
    assert (best >= kept - 1e-9).all() and (best[1:, 1:] > kept[1:, 1:] + 1e-6).any()
    assert found.listed().sum(-1)[1:].tolist() == (lists.counts[:, 0] * g).tolist()


def test_a_prompt_shorter_than_a_block():
    loaded = _loaded("sdar_b16")
    found = inspect_block(loaded, _prompt(5), _config())
    assert found.prefix == [] and found.decided_at[:5] == [-1] * 5 and -1 not in found.decided_at[5:]
    assert found.masses.shape[-1] == 16 and not found.listed().any()
    assert "What a block reads" in inspection.page(found, loaded.tokenizer, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mode="method", method=method_comparison._ExactWithMass(1)), "must have mode mage or"),
        (dict(exact_steps=2), "exact_steps 1, got mage, False, 2"),
        (dict(max_new_tokens=9), "block must be an integer in \\[0, 3\\), got 3"),
        (dict(dense_layers=(0, 1, 2)), "dense_layers must leave a layer that selects"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        inspect_block(_loaded(), _prompt(40), dataclasses.replace(_config(), **change), block=3)


def test_a_block_that_the_answer_does_not_have():
    loaded, prompt = _loaded(), _prompt(40)
    (answer,) = generate(loaded.model, [prompt], _config())
    config = dataclasses.replace(loaded.config, eos_ids=(answer.tokens[1],))
    ends = LoadedModel(config, tiny_model(config, seed=1), loaded.tokenizer)
    assert len(inspect_block(ends, prompt, _config()).prefix) == 40
    with pytest.raises(ValueError, match="block must be below 1, the answer's blocks, got 1"):
        inspect_block(ends, prompt, _config(), block=1)


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_that_is_known_without_a_forward(block):
    """Where logits predict the next position, the forward before a block decides its first token."""
    loaded = _loaded("llama_shift")
    prompt, config = _prompt(3 * loaded.config.block_size), _config()
    config = dataclasses.replace(config, max_new_tokens=block * loaded.config.block_size + 1)
    message = f"block must be one with a forward of its own, got {block}, whose tokens the forward before it decided"
    with pytest.raises(ValueError, match=message):
        inspect_block(loaded, prompt, config, block=block)
    assert inspect_block(loaded, prompt[1:], config, block=block).kinds


def test_a_page_that_would_be_too_large_is_refused_before_the_prefill(monkeypatch):
    monkeypatch.setattr(inspection, "MAX_MASS_BYTES", 500)
    monkeypatch.setattr(inspection, "prefill", None)
    with pytest.raises(ValueError, match=r"prompt must be shorter.*40 tokens in 2 forwards need 528 bytes"):
        inspect_block(_loaded(), _prompt(40), _config())


def test_bytes_keep_six_decades():
    generator = torch.Generator().manual_seed(0)
    masses = 10 ** (-9 * torch.rand(2, 3, 2, 500, generator=generator))
    masses[0, 0, 0] = 0
    scales, codes = quantise(masses)
    codes = torch.from_numpy(codes).double()
    back = torch.where(codes > 0, scales[..., None] * 10 ** (6 * (codes - 255) / 254), 0.0)
    ratio = back / masses.double()
    is_large = (masses >= scales[..., None] * 1e-6 * 1.0001) & (masses > 0)
    bound = 10 ** (6 / 508) * 1.0001
    assert ratio[is_large].min() >= 1 / bound and ratio[is_large].max() <= bound
    is_small = masses < scales[..., None] * 1e-6 * 0.9999
    assert is_small.any() and (back[is_small] == 0).all() and (back[0, 0, 0] == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Texts


def test_pieces_are_the_text():
    tokenizer = _tokenizer()
    ids = tokenizer.encode(ODD)
    found = inspection.pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids)
    assert "🎉" in found and found[found.index("🎉") - 3 : found.index("🎉")] == [""] * 3
    broken = [*tokenizer.encode("a"), 0xF0, 0x9F]  # half a character at the end
    assert inspection.pieces(tokenizer, broken)[:2] == ["a", ""]
    assert "".join(inspection.pieces(tokenizer, broken)) == tokenizer.decode(broken)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 🎉 שלום", "plain é 🎉 שלום"),
        ("a\nb\tc\r\x00\x7f", "a↵\nb␉c␍␀␡"),
        ("\u202e\u200b\u2028\x85\ufeff", "⟨U+202E⟩⟨U+200B⟩⟨U+2028⟩⟨U+0085⟩⟨U+FEFF⟩"),
        ("👩‍🚀\xa0\u3000", "👩‍🚀\xa0\u3000"),
    ],
)
def test_what_is_invisible_can_be_seen(text, shown):
    assert pages.visible(text) == shown


def test_markup_in_data_and_text_has_no_effect():
    held = pages.json_for_script({"text": ODD})
    assert not re.search(r"[<>&]", held) and held.isascii() and json.loads(held) == {"text": ODD}
    assert pages.escape('<a href="x">&') == "&lt;a href=&quot;x&quot;&gt;&amp;"
    with pytest.raises(ValueError, match="script must not hold </script"):
        pages.page("t", "b", script="'</SCRIPT>'")
    with pytest.raises(ValueError, match="not JSON compliant"):
        pages.json_for_script([float("nan")])


# ----------------------------------------------------------------------------------------------------------------------
# The page in a browser

needs_chromium = pytest.mark.skipif(browser.chromium() is None, reason="chromium is not installed")


@needs_chromium
def test_the_browser_reports_requests_and_errors(tmp_path):
    """The check that other tests rely on: what a page must not do does show up."""
    path = tmp_path / "bad.html"
    body = '<img src="http://127.0.0.1:9/x.png"><p id="p"></p>'
    script = 'fetch("http://127.0.0.1:9/").catch(() => 0);\ndocument.getElementById("p").textContent = "ran"; nosuch();'
    pages.write_page(path, pages.page("bad", body, script=script))
    opened = browser.open_page(path, tmp_path / "profile")
    assert opened.by_id("p").text == "ran"
    assert sum("Content Security Policy directive" in line for line in opened.console) >= 2
    assert any("nosuch is not defined" in line for line in opened.console)


@pytest.fixture(scope="module")
def odd_page(tmp_path_factory):
    """A page of the odd text in a model with one token per byte."""
    folder = tmp_path_factory.mktemp("page")
    loaded = _loaded("llama")
    prompt = loaded.tokenizer.encode(ODD)
    prompt += loaded.tokenizer.encode("." * ((2 - len(prompt)) % 8))  # the block starts with the last two
    found = inspect_block(loaded, prompt, _config(k=32, g=16))
    assert len(found.prefix) > 100 and len(found.kinds) == 3
    pages.write_page(
        folder / "page.html", inspection.page(found, loaded.tokenizer, {"model": "</b><script>x</script>"})
    )
    return folder, loaded, found


def _open(odd_page, address=""):
    folder, _, found = odd_page
    opened = browser.open_page(folder / "page.html", folder / "profile", address)
    assert opened.console == []
    tokens = opened.find("span", "t")
    tokens = [token for token in tokens if "data-i" in token.attributes]
    assert [int(token.attributes["data-i"]) for token in sorted(tokens, key=_number)] == list(
        range(found.masses.shape[-1])
    )
    return opened, sorted(tokens, key=_number)


def _number(token):
    return int(token.attributes["data-i"])


def _check_shades(found, tokens, mass):
    """The blue of the tokens against a mass [S]: square roots, darkest where one in a hundred before has more."""
    pattern = re.compile(r"background-color: rgba\(31, 119, 180, ([\d.]+)\)")
    shades = [pattern.search(token.attributes.get("style", "")) for token in tokens]
    shades = torch.tensor([float(match[1]) if match else 0.0 for match in shades], dtype=torch.float64)
    ranked = mass[: len(found.prefix)].double().sort().values
    top = ranked[max(0, len(ranked) - 1 - -(-len(ranked) // 100))]
    strength = (mass.double() / top).sqrt().clamp(max=1)
    # A byte errs by a factor of up to 10^(6/508), so does the darkest mass. The page rounds alpha to 3 digits, the
    # browser to 255ths, and what it prints is a short number that rounds to the same 255th.
    error = 10 ** (6 / 508)
    low = torch.where(strength > 0.02 * error, 0.85 * strength / error, 0.0)
    high = torch.where(strength > 0.02 / error, 0.85 * strength * error, 0.0)
    rounding = 0.0005 + 0.5 / 255 + 0.5 / 255
    bad = ((shades < low - rounding) | (shades > high + rounding)).nonzero().flatten()
    assert bad.tolist() == [], (shades[bad], low[bad], high[bad])
    assert shades.max() > 0.8 and shades.unique().numel() > 10


@needs_chromium
def test_page_shows_the_text(odd_page):
    _, loaded, found = odd_page
    opened, tokens = _open(odd_page)
    assert opened.find("title")[0].text == "What a block reads"
    texts = inspection.pieces(loaded.tokenizer, found.prefix)
    assert [token.text for token in tokens[: len(found.prefix)]] == [pages.visible(text) or "⋅" for text in texts]
    assert [script.attributes for script in opened.find("script")] == [{"type": "application/json", "id": "data"}, {}]
    assert "</b><script>x</script>" in opened.find("p", "dim")[0].text
    assert opened.by_id("layer-out").text == opened.by_id("head-out").text == "all"


@needs_chromium
@pytest.mark.parametrize("layer, head, step", [(1, 0, 0), (2, 1, 0), (2, 1, 2), (0, 1, 1)])
def test_page_shows_each_layer_head_and_forward(odd_page, layer, head, step):
    _, loaded, found = odd_page
    opened, tokens = _open(odd_page, f"#layer={layer}&head={head}&step={step}")
    assert opened.find("body")[0].attributes["data-drawn"] == f"{layer},{head},{step}"
    _check_shades(found, tokens, found.masses[step, layer, head])
    listed = [_number(token) for token in tokens if "listed" in token.classes]
    assert listed == found.listed()[layer, head].nonzero().flatten().tolist() and bool(listed) == (layer > 0)
    tail = [_number(token) for token in tokens if "tail" in token.classes]
    assert tail == (list(range(found.tail_start, len(found.prefix))) if layer else [])
    final = inspection.pieces(loaded.tokenizer, found.prefix + found.tokens)
    for position, at in enumerate(found.decided_at):
        token = tokens[len(found.prefix) + position]
        is_open = at is None or at > step
        assert ("open" in token.classes) == is_open and ("new" in token.classes) == (at == step)
        text = "░" if is_open else pages.visible(final[len(found.prefix) + position]) or "⋅"
        assert token.text == text
    kept, best = found.kept()
    numbers = opened.by_id("numbers").text
    if layer:
        assert f"keep {100 * kept[step, layer, head]:.2f} %" in numbers
        assert f"would keep {100 * best[step, layer, head]:.2f} %" in numbers
    else:
        assert numbers == "Dense: everything is read."
    assert len(opened.find("rect", "cell")) >= found.masses.shape[1] * found.masses.shape[2]


@needs_chromium
def test_page_shows_means_and_ignores_addresses_that_mean_nothing(odd_page):
    _, _, found = odd_page
    opened, tokens = _open(odd_page, "#layer=99&head=x&step=-5&<script>")
    assert opened.find("body")[0].attributes["data-drawn"] == f"{found.masses.shape[1] - 1},-1,0"
    _check_shades(found, tokens, found.masses[0, -1].mean(0))


def test_a_page_asks_for_nothing(odd_page):
    text = (odd_page[0] / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    outside = re.findall(r"""(?:src|href)\s*=|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\s*\(""", text)
    assert outside == []
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_size_at_2048_tokens_30_layers_8_forwards():
    generator = torch.Generator().manual_seed(0)
    shape = (8, 30, 3, 2080)
    found = Inspection(
        config=_config(k=128, dense=(0, 1)),
        layers={layer: layer - 2 for layer in range(2, 30)},
        block=0,
        prefix=_prompt(2048),
        tokens=_prompt(32),
        decided_at=[i // 4 for i in range(32)],
        kinds=["select", *["sparse"] * 7],
        masses=torch.rand(shape, generator=generator).softmax(-1),
        lists=torch.rand(28, 3, 2081, generator=generator) < 0.06,
        tail_start=2048,
    )
    assert len(inspection.page(found, _tokenizer(), {}).encode()) < 5_000_000


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_mistakes_of_the_command(tmp_path, capsys):
    out = str(tmp_path / "page.html")
    for arguments, message in (
        (["--out", str(tmp_path / "no" / "page.html")], "inspect: out must be in a folder that exists"),
        (["--out", out, "--raw"], "inspect: raw must come with --prompt or --text, got neither"),
        (["--out", out, "--prompt", "x", "--model", "no/such/folder"], "no/such/folder"),
        (["--out", out, "--text", "no-such-file"], "no-such-file"),
    ):
        assert cli.main(["inspect", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("mage: error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@needs_chromium
def test_inspect_finds_the_fact_in_a_file(tmp_path, capsys):
    try:
        builtin.base_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    text = tmp_path / "text.txt"
    fact = "The secret code of the timid oyster is 4821973. "
    text.write_text("The ferryman counted the coins twice. " * 12 + fact + "It rained for a week. " * 8)
    question = "Question: What is the secret code of the timid oyster? Answer with the number only."
    arguments = ["--text", str(text), "--prompt", question, "--max-new-tokens", "16", "-k", "32", "--block", "1"]
    assert cli.main(["inspect", *arguments, "--out", str(tmp_path / "page.html")]) == 0
    assert "written: " in capsys.readouterr().out
    opened = browser.open_page(tmp_path / "page.html", tmp_path / "profile", "#step=99")
    assert opened.console == []
    # The prompt's end leaves room for three digits in its block.
    tokens = sorted((t for t in opened.find("span", "t") if "data-i" in t.attributes), key=_number)
    assert "assistant\u21b5\n4821973" in "".join(token.text for token in tokens)
    # More lists hold the fact's digits than what is told around it.
    shares = [int(re.search(r"in (\d+) % of the lists|$", token.attributes["title"])[1] or 0) for token in tokens]
    place = [token.text for token in tokens].index("4")
    told = [share for token, share in zip(tokens, shares, strict=True) if token.text in (" fer", "ryman", " coins")]
    assert "".join(token.text for token in tokens[place : place + 7]) == "4821973" and told
    assert sum(shares[place : place + 7]) / 7 > 3 * sum(told) / len(told)
