"""`slotpool add`: the configuration of one model, from what its file says of itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import yaml

from app.cli.artifacts import has_template, size_of
from app.cli.found import free_id, id_of
from app.cli.hub import fetched_header
from app.cli.machine import Machine, machine
from app.cli.model_block import Line, block, insert
from app.cli.output import Column, Misuse, json_option, mib, printable, show_json, table
from app.cli.sizing import Size, Sizing
from app.model_files import FILE_TYPES
from deployments.engines.llama_cpp.gguf import GgufError, GgufHeader, read_header
from deployments.engines.llama_cpp.memory import LEAST_CONTEXT
from deployments.weights import weights_at_hand

#: The part of the host's memory that a model on the CPU may have: the pool and the system want some, too.
HOST_SHARE = 0.7
FITS = (
    Column("SLOTS", "slots", is_number=True),
    Column("CONTEXT", "context", is_number=True),
    Column("TAKES", "memory_mib", mib, is_number=True),
)


class Found(NamedTuple):
    """What is known of a model's file, how large it may be here, and what it is to begin with."""

    facts: dict[str, Any]
    fits: list[Size]
    first: Size | None
    num_gpus: int


@click.command("add")
@click.argument("source", metavar="PATH|hf:OWNER/REPO/FILE")
@click.option("--id", "model_id", help="What the model is to be called (default: after its file).")
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), help="Write it into this pool configuration.")
@click.option("--gpus", type=click.IntRange(min=0), help="Reckon with so many GPUs, not with those of this machine.")
@click.option("--gpu-memory", type=click.IntRange(min=1), metavar="MIB", help="What each GPU has, in MiB.")
@json_option
def command(
    source: str, model_id: str | None, to: Path | None, gpus: int | None, gpu_memory: int | None, as_json: bool
) -> None:
    """Write the configuration of a GGUF model, with as many slots and as much context as fit here.

    The header of the file says what it is. Of a file on the hub (hf:) only the header is fetched.
    """
    with file_of(source) as path:
        try:
            found = look(path, source, read_header(path), machine(gpus, gpu_memory))
        except GgufError as error:
            raise Misuse(str(error)) from None
    name = model_id or id_of(Path(source))
    if as_json:
        shown = {"model": name, "config": config_of(source, found), "file": found.facts}
        show_json({**shown, "fits": [each._asdict() for each in found.fits]})
        return
    if to is None:
        click.echo("models:\n" + block(name, lines_of(source, found)), nl=False)
    else:
        name = write(to, name, source, found)
        click.echo(f"{to}: {name} was added. Serve it: slotpool serve --config {to}")
    _tell(found)


@contextlib.contextmanager
def file_of(source: str) -> Iterator[Path]:
    """The model's file, or its header where it is still on the hub. Raises `Failure`."""
    path = weights_at_hand(source)
    if path is None and source.startswith("hf:"):
        with fetched_header(source.removeprefix("hf:")) as fetched:
            yield fetched
        return
    if path is None:
        raise Misuse(f"there is no file {source!r}")
    if not (path.is_file() and path.suffix == ".gguf"):
        raise Misuse(f"{path.name} is no GGUF file; a folder of them is served by slotpool serve FOLDER")
    yield path


def look(path: Path, source: str, header: GgufHeader, here: Machine) -> Found:
    """What a header tells, and what fits: on as few devices as hold the weights, or on the CPU without any."""
    trained = header.of_architecture("context_length")
    trained = trained if isinstance(trained, int) else LEAST_CONTEXT
    facts = {
        "name": header.metadata.get("general.name"),
        "architecture": header.metadata.get("general.architecture"),
        "quantisation": FILE_TYPES.get(header.metadata.get("general.file_type", -1)),
        "size_mib": size_of(path) >> 20,
        "context_length": trained,
        "has_chat_template": has_template(header),
        "is_embedding": header.of_architecture("pooling_type") is not None,
    }
    device_mib = here.device_mib
    for count in range(1, len(here.devices) + 1):
        # Of a device whose memory nobody knows, one is enough.
        sizing = Sizing(path, trained, device_mib * count or 2**40, 1)
        first = sizing.first()
        if first is not None:
            return Found(facts, sizing.all() if device_mib else [], first, count)
    sizing = Sizing(path, trained, int(here.host_mib * HOST_SHARE), 0)
    return Found(facts, sizing.all(), sizing.first(), 0)


def lines_of(source: str, found: Found) -> list[Line]:
    """The keys of the model with what is to be said of them."""
    facts, first = found.facts, found.first
    kind = " ".join(str(facts[key]) for key in ("architecture", "quantisation") if facts[key])
    lines = [Line("model_path", path_for_config(source), f"{kind}, {mib(facts['size_mib'])}")]
    if facts["is_embedding"]:
        lines.append(Line("type", "embedding"))
    device = "" if found.num_gpus else "on the CPU"
    lines.append(Line("num_gpus", found.num_gpus, device))
    if first is None:
        lines[-1] = Line("num_gpus", found.num_gpus, "does not fit into this machine's memory")
        return lines
    lines.append(Line("target_inflight", first.slots, f"slots: takes {mib(first.memory_mib)} with all of them"))
    lines.append(Line("gguf_n_ctx", first.context, f"tokens per slot, of {facts['context_length']}"))
    return lines


def config_of(source: str, found: Found) -> dict[str, Any]:
    """The keys of the model."""
    return {line.key: line.value for line in lines_of(source, found)}


def path_for_config(source: str) -> str:
    """A path that does not depend on where the pool is started."""
    return source if source.startswith(("hf:", "package:")) else str(Path(source).expanduser().resolve())


def write(to: Path, name: str, source: str, found: Found) -> str:
    """Put the model into a configuration, which keeps its comments; the id that it got. Raises `Failure`."""
    text = to.read_text(encoding="utf-8") if to.exists() else ""
    try:
        known = (yaml.safe_load(text) or {}).get("models") or {}
    except (yaml.YAMLError, AttributeError):
        raise Misuse(f"{to} is no pool configuration") from None
    name = free_id(name, known)
    changed = insert(text, name, lines_of(source, found))
    to.write_text(changed, encoding="utf-8")
    return name


def _tell(found: Found) -> None:
    """What else is to be known, beside the YAML."""
    facts = found.facts
    if not facts["has_chat_template"] and not facts["is_embedding"]:
        click.echo("It has no chat template: configure prompt_format, or ask it for completions only.", err=True)
    if found.fits:
        click.echo("# What fits:", err=True)
        from app.cli.output import console

        console(stderr=True).print(table(FITS, [each._asdict() for each in found.fits]))
    elif found.first is None:
        click.echo(printable("It does not fit here."), err=True)
