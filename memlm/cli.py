"""The ``memlm`` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from memlm._format import FLOATS
from memlm.io.files import replacing

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Language models in little memory, and fast.",
)
out = Console()
err = Console(stderr=True)

Model = Annotated[
    str,
    typer.Argument(
        help="A packed memlm folder, a Hugging Face folder, a GGUF file, or 'smollm2' / 'minilm' "
        "(fetched)."
    ),
]
Json = Annotated[
    Optional[Path], typer.Option("--json", help="Write the result here as JSON ('-': standard output).")
]
Threads = Annotated[Optional[int], typer.Option(min=1, help="Threads (default: torch's).")]
Pages = Annotated[
    str,
    typer.Option(
        help="Where weights lie: mapped, populated (read at once), or huge (a copy in 2 MB pages)."
    ),
]
Kv = Annotated[
    Optional[str],
    typer.Option(help="What keys and values are stored as: f32, bf16, int8, int4 (default: as computed)."),
]
Linear = Annotated[
    str,
    typer.Option(
        help="Format of linear layers: int4, int4a-g64, int8, ...; of pruned ones block/int4, "
        "2:4/int4, unstructured/int4, ..."
    ),
]
EMBEDDING_HELP = "Format of embeddings and of a head tied to one; 'float' leaves them."


def resolve(model: str) -> Path:
    """A path, or one of the models that memlm fetches."""
    from memlm import data

    known = {"smollm2": data.smollm2_gguf, "minilm": data.minilm}
    return known[model]() if model in known and not Path(model).exists() else Path(model)


def write_json(value: dict, path: Path | None) -> None:
    if path is None:
        return
    text = json.dumps(value, indent=1)
    if str(path) == "-":
        print(text)
    else:
        with replacing(path) as file:
            file.write(text.encode() + b"\n")


class Bar:
    """A progress bar on standard error that serves as memlm's progress callback."""

    def __init__(self, title: str):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[item]}"),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task = self._progress.add_task(title, total=None, item="")

    def __enter__(self):
        self._progress.start()
        return lambda done, total, item: self._progress.update(
            self._task, completed=done, total=total, item=item
        )

    def __exit__(self, *_):
        self._progress.stop()


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def _format(name: str) -> str | None:
    return None if name == "float" else name


def _targets(texts: list[str] | None, value: str) -> dict[str, str]:
    """{pattern: value} of what was given as PATTERN=VALUE."""
    targets = {}
    for text in texts or ():
        pattern, equals, given = text.rpartition("=")
        if not equals:
            raise ValueError(f"--target {text!r}: expected PATTERN={value}")
        targets[pattern] = given
    return targets


@app.command()
def quantize(
    src: Model,
    dst: Annotated[Path, typer.Argument(help="The folder to write.")],
    linear: Linear = "int4",
    embedding: Annotated[str, typer.Option(help=EMBEDDING_HELP)] = "int8",
    target: Annotated[
        Optional[list[str]],
        typer.Option(
            help="PATTERN=FORMAT for layers that differ; a layer's name or re:REGEX; 'float' leaves "
            "them. Repeatable, the first that matches counts."
        ),
    ] = None,
    ignore: Annotated[
        Optional[list[str]], typer.Option(help="PATTERN of layers to leave in floats. Repeatable.")
    ] = None,
    mode: Annotated[
        Optional[str],
        typer.Option(help="fast or accurate (default: fast for 4 bits, accurate for 8)."),
    ] = None,
    requantize: Annotated[
        bool, typer.Option(help="Round anew what the file already holds in codes.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Quantise a model into a folder that memlm maps, tensor by tensor.

    What the file already holds in codes (GGUF, compressed-tensors, GPTQ, AWQ) keeps them, exactly,
    where memlm's kernels can execute them.  A run that was killed goes on where it stopped.
    """
    import memlm

    targets = {name: _format(text) for name, text in _targets(target, "FORMAT").items()}
    linear, embedding = _format(linear), _format(embedding)
    config = memlm.QuantConfig(linear, embedding, embedding, mode, targets, ignore or ())
    with Bar("quantising") as bar:
        files = memlm.quantize_files(resolve(src), dst, config, requantize, bar)
    account = memlm.explain(memlm.load(dst))
    weights = files["model.safetensors"]
    packed = {row.format for row in account.rows if row.mode or row.type == "Embedding"}
    result = {
        "path": str(dst),
        "disk_bytes": weights,
        "of_f32": weights / account.float_bytes,
        "formats": sorted(packed),
    }
    if str(json_file) != "-":
        out.print(f"{dst}: {megabytes(weights)}, {weights / account.float_bytes:.0%} of f32")
    write_json(result, json_file)


@app.command()
def prune(
    src: Model,
    dst: Annotated[Path, typer.Argument(help="The folder to write.")],
    method: Annotated[str, typer.Option(help="sparsegpt, wanda, or magnitude.")] = "sparsegpt",
    sparsity: Annotated[float, typer.Option(help="Share of zeros.")] = 0.5,
    pattern: Annotated[str, typer.Option(help="block, 2:4, or unstructured.")] = "unstructured",
    format: Annotated[
        str,
        typer.Option(
            help="What the weights that stay are rounded to: int4, int8-g32, nf4-g64, with block "
            "f32 and bf16; 'float': nothing is rounded, and the zeros are stored."
        ),
    ] = "int4",
    block: Annotated[str, typer.Option(help="ROWSxCOLUMNS of a block.")] = "16x32",
    allocation: Annotated[
        str, typer.Option(help="uniform, or sensitivity: layers that can spare more lose more.")
    ] = "uniform",
    calibration: Annotated[
        Optional[Path],
        typer.Option(
            help="A text file (default: State of the Union addresses, fetched; for magnitude with "
            "a uniform allocation none, and no errors are told)."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pieces of the text.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 512,
    target: Annotated[
        Optional[list[str]],
        typer.Option(
            help="PATTERN=SPARSITY for layers that differ, as for quantize; 'float' leaves them "
            "alone. Repeatable."
        ),
    ] = None,
    ignore: Annotated[
        Optional[list[str]], typer.Option(help="PATTERN of layers to leave alone. Repeatable.")
    ] = None,
    embedding: Annotated[str, typer.Option(help=EMBEDDING_HELP)] = "int8",
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Take weights out of a model's linear layers, layer by layer, and store what is left.

    Layers that are left alone are stored in --format, too, as far as a dense one has it; what the
    file already holds in codes keeps them.
    """
    import memlm
    from memlm import data, memory
    from memlm.io.packed_folder import check_target

    targets = {name: _share(text) for name, text in _targets(target, "SPARSITY").items()}
    try:
        rows, columns = map(int, block.split("x"))
    except ValueError:
        raise ValueError(f"--block {block!r}: expected ROWSxCOLUMNS") from None
    config = memlm.PruneConfig(
        method, sparsity, pattern, (rows, columns), _format(format), allocation, targets,
        ignore or (), samples=samples, length=length,
    )  # fmt: skip
    check_target(dst)
    _set_threads(threads)
    memory.return_freed()  # blocks of many sizes come and go
    model = memlm.load(resolve(src))
    if calibration:
        text = calibration.read_text("utf-8")
    else:
        needed = method != "magnitude" or allocation != "uniform"
        text = data.state_of_the_union() if needed else None
    with Bar("pruning") as bar:
        report = memlm.prune_(model, config, text, bar)
    dense, embedding = None if format in ("float", *FLOATS) else format, _format(embedding)
    memlm.quantize_(model, memlm.QuantConfig(dense, embedding, embedding))
    files = memlm.save(model, dst)
    result = {
        "path": str(dst),
        "disk_bytes": files["model.safetensors"],
        "of_f32": files["model.safetensors"] / memlm.explain(model).float_bytes,
        **report.to_dict(),
    }
    if str(json_file) != "-":
        out.print(str(report), soft_wrap=True, highlight=False, markup=False)
        for layer in report.layers:
            more = layer.bytes - layer.dense_bytes
            if more > 0:
                text = f"{layer.name}: {more:,} bytes more than dense: with so few zeros, "
                text += f"{layer.pattern} saves nothing"
                out.print(text, soft_wrap=True, highlight=False, markup=False)
        out.print(f"{dst}: {megabytes(result['disk_bytes'])}, {result['of_f32']:.0%} of f32")
    write_json(result, json_file)


def _share(text: str) -> float | None:
    return None if text == "float" else float(text)


@app.command()
def export(
    src: Model,
    dst: Annotated[Path, typer.Argument(help="The folder or, for gguf, the file to write.")],
    to: Annotated[
        str, typer.Option(help="f32, bf16, f16 (safetensors), gguf, or compressed-tensors.")
    ] = "bf16",
    json_file: Json = None,
) -> None:
    """Write a model for other programs: transformers, vLLM, llama.cpp.

    Packed matrices keep their codes wherever the target has a type that holds them exactly.
    """
    from memlm.export import export as write

    with Bar("exporting") as bar:
        result = write(resolve(src), dst, to, bar)
    if str(json_file) != "-":
        out.print(f"{dst}: {megabytes(sum(result['files'].values()))}")
        if rounded := result["rounded"]:
            out.print(f"{len(rounded)} tensors were rounded, {rounded[0]} the first", highlight=False)
    write_json(result, json_file)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A packed memlm folder.")]) -> None:
    """Compare the bytes of a folder's weights with the checksums that were written with them."""
    from memlm.io import safetensors

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: has no safetensors files")
    for file in files:
        state = "as written" if safetensors.verify(file) else "has no checksum"
        out.print(f"{file}: {state}", highlight=False)


@app.command()
def info(model: Model, json_file: Json = None) -> None:
    """List a model's layers: kernel, instruction set, bytes, and what is not packed and why; and
    what memory this process takes with the model loaded."""
    import memlm
    from memlm import memory

    explain, load = memlm.explain, memlm.load  # imported now: the baseline holds their memory
    base = memory.baseline()
    memory.reset_peak()
    loaded = load(resolve(model))
    explanation, account = explain(loaded), memory.account(base, loaded)
    if str(json_file) != "-":
        out.print(str(explanation), soft_wrap=True, highlight=False, markup=False)
        out.print(memory_table(account.to_dict()))
    write_json({**explanation.to_dict(), "memory": account.to_dict()}, json_file)


def memory_table(parts: dict[str, int]) -> Table:
    """Resident bytes by part, as memlm.memory.Account says."""
    table = Table("memory", "resident")
    for name, count in parts.items():
        table.add_row(name.replace("_", " "), megabytes(count))
    table.add_row("peak", megabytes(sum(parts.values())))
    return table


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to continue, or to answer with --chat.")],
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 1.0,
    seed: Annotated[Optional[int], typer.Option(help="Repeatable sampling.")] = None,
    kv: Kv = None,
    threads: Threads = None,
    pages: Pages = "mapped",
    json_file: Json = None,
) -> None:
    """Continue a text, or answer a question, as it is made."""
    import memlm

    _set_threads(threads)
    loaded = memlm.load(resolve(model), pages=pages)
    text, tokens, seconds = stream(
        loaded, prompt, chat, max_tokens, temperature, top_k, top_p, seed, kv,
        show=str(json_file) != "-",
    )  # fmt: skip
    err.print(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s", highlight=False)
    write_json({"text": text, "tokens": tokens, "seconds": seconds}, json_file)


def stream(model, prompt, chat, max_tokens, temperature, top_k, top_p, seed, kv=None, show=True):
    """Generates, printing as it goes; returns the text, its tokens and the seconds it took."""
    import time

    from memlm.models.generate import TextStream
    from memlm.models.generate import generate as tokens_of

    tokenizer = model.tokenizer
    if chat:
        prompt = tokenizer.apply_chat([{"role": "user", "content": prompt}])
    pieces, count, text = TextStream(tokenizer), 0, ""
    start = time.perf_counter()

    def give(piece: str) -> str:
        if show:
            sys.stdout.write(piece)
            sys.stdout.flush()
        return piece

    for token in tokens_of(
        model, tokenizer.encode(prompt), max_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, stop_ids=tokenizer.eos_ids, seed=seed, kv=kv,
    ):  # fmt: skip
        count += 1
        text += give(pieces.push(token))
    text += give(pieces.finish())
    if show:
        print()
    return text, count, time.perf_counter() - start


@app.command("eval")
def evaluate(
    model: Model,
    base: Annotated[
        Optional[str], typer.Option(help="The float model to compare with: adds KL and agreement.")
    ] = None,
    text: Annotated[
        Optional[Path], typer.Option(help="A text file (default: Moby-Dick, fetched).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many of its tokens.")] = 8192,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    kv: Kv = None,
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Perplexity on a text, and KL divergence from the float model."""
    from dataclasses import asdict

    import memlm
    from memlm import data
    from memlm.models.evaluate import evaluate as score

    _set_threads(threads)
    source = text.read_text("utf-8") if text else data.moby_dick()
    loaded = memlm.load(resolve(model))
    reference = memlm.load(resolve(base), dequantize=True) if base else None
    ids = loaded.tokenizer.encode(source)[:tokens]
    with Bar("evaluating") as bar:
        result = asdict(score(loaded, ids, reference, window, bar, kv))
    if str(json_file) != "-":
        table = Table("measure", "value")
        for name, value in result.items():
            if value is not None:
                table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
        out.print(table)
    write_json(result, json_file)


@app.command()
def bench(
    model: Model,
    kv: Kv = None,
    threads: Threads = None,
    pages: Pages = "mapped",
    json_file: Json = None,
) -> None:
    """Time a model: loading, prefill, decoding; and its resident memory by part."""
    from memlm.measure import measure

    _set_threads(threads)
    result = measure(resolve(model), pages=pages, kv=kv).to_dict()
    if str(json_file) != "-":
        table = Table("measure", "value")
        for name, value in result.items():
            if name != "memory":
                table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else f"{value}")
        out.print(table)
        out.print(memory_table(result["memory"]))
    write_json(result, json_file)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder, a config.json, a GGUF file, 'smollm2' / 'minilm', or numbers "
            "under Hugging Face's names: hidden_size=2048,num_hidden_layers=22,..."
        ),
    ],
    ram: Annotated[str, typer.Option(help="What must suffice: 8GB, 512MB, 16GiB.")] = "8GB",
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    prompt: Annotated[
        Optional[int], typer.Option(help="Tokens computed at once, of the context (default: all).")
    ] = None,
    formats: Annotated[
        Optional[list[str]],
        typer.Option("--format", help="Considered, the most wanted first; several times."),
    ] = None,
    embedding: Annotated[str, typer.Option(help=EMBEDDING_HELP)] = "int8",
    dtype: Annotated[
        str, typer.Option(help="Of packed models' activations: float32, bfloat16.")
    ] = "float32",
    train: Annotated[
        Optional[str], typer.Option(help="'full' or 'lora' (default: inference).")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, sgd, adafactor.")] = "adamw",
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA's adapters.")] = 16,
    sparsity: Annotated[
        float, typer.Option(help="Share of zeros, where a --format is sparse: block/int4, ...")
    ] = 0.5,
    plot: Annotated[Optional[Path], typer.Option(help="Draw it to this image.")] = None,
    json_file: Json = None,
) -> None:
    """Predict a model's peak memory by part, before anything is loaded, and recommend settings."""
    from memlm import picture
    from memlm import plan as planner

    known = model in ("smollm2", "minilm") and not Path(model).exists()
    config = planner.read_config(resolve(model) if known else model)
    packable = [f for f in planner.FORMATS if train != "full" or f in planner.DTYPES]
    formats = formats or packable
    settings = planner.Settings(
        context, batch, formats[0], embedding, dtype, prompt, train, optimizer, rank=rank,
        sparsity=sparsity,
    )  # fmt: skip
    limit = planner.parse_bytes(ram)
    planner.recommend(config, settings, limit, formats)  # refuses before anything is measured
    base = planner.base(config, settings)
    advice = planner.recommend(config, settings, limit, formats, base)
    work = f"{train} training with {optimizer}" if train else "inference"
    title = f"{model}: {work}, context {context:,}, batch {batch}"
    if str(json_file) != "-":
        out.print(title, highlight=False)
        out.print(picture.table(advice))
        out.print(picture.conclusion(advice), highlight=False)
        out.print(picture.NOTE, highlight=False)
    if plot:
        picture.draw(advice, title, plot)
    write_json(advice.to_dict(), json_file)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where the report goes.")] = Path("report"),
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Fetch SmolLM2 and MiniLM, quantise them, and show what that costs and gains."""
    from memlm.demo import run

    _set_threads(threads)
    out.stderr = str(json_file) == "-"  # standard output is the JSON's
    run(folder, json_file)


def main() -> None:
    """Runs the command; expected errors are one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        err.print(f"memlm: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
