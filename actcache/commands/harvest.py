"""`actcache harvest`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from actcache.commands.from_saelens import options_of_saelens
from actcache.commands.named_sources import note_model, note_named
from actcache.commands.terminal import (
    CACHE,
    DATA,
    MODEL,
    Adapter,
    AllowPickle,
    Bar,
    Device,
    NoLock,
    Out,
    TrustRemoteCode,
    local_device,
    locking,
    require_room_for,
    say,
    this_worker,
)
from actcache.errors import ConfigError


def harvest(
    model: Annotated[
        str, typer.Option(help="The model: a Hugging Face name or a local directory.", rich_help_panel=MODEL)
    ],
    hook: Annotated[
        list[str],
        typer.Option(
            help="A hook to store, such as blocks.8.hook_resid_post. Repeat it for several.", rich_help_panel=MODEL
        ),
    ],
    dataset: Annotated[
        str,
        typer.Option(
            help="The texts: a hub name, a folder, or a text, JSON, CSV, parquet or arrow file, also compressed.",
            rich_help_panel=DATA,
        ),
    ],
    out: Out,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Rows to store, of both splits together.", show_default="all there are", rich_help_panel=DATA
        ),
    ] = None,
    context_size: Annotated[int, typer.Option(help="Tokens in a sequence.", rich_help_panel=DATA)] = 128,
    codec: Annotated[
        str,
        typer.Option(
            help="How rows are compressed: lossless, fast, raw or int8; auto measures three and takes one.",
            rich_help_panel=CACHE,
        ),
    ] = "lossless",
    dtype: Annotated[
        str, typer.Option(help="Rows are stored as bfloat16, float16 or float32.", rich_help_panel=CACHE)
    ] = "bfloat16",
    model_dtype: Annotated[
        str,
        typer.Option(
            help="The model runs in float32, bfloat16 or float16. With auto it is float32 on a CPU, and as stored "
            "elsewhere.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences in a forward pass.", show_default="chosen", rich_help_panel=MODEL)
    ] = None,
    device: Device = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="With auto, the model is spread over all GPUs.", rich_help_panel=MODEL)
    ] = None,
    attention: Annotated[
        str, typer.Option(help="The kernel: auto, sdpa, eager or flash_attention_2.", rich_help_panel=MODEL)
    ] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run the model's blocks through torch.compile.", rich_help_panel=MODEL)
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Revision of the model on the hub.", rich_help_panel=MODEL)
    ] = None,
    adapter: Adapter = None,
    dataset_config: Annotated[
        str | None, typer.Option(help="Configuration of a hub dataset or of its copy here.", rich_help_panel=DATA)
    ] = None,
    dataset_revision: Annotated[
        str | None, typer.Option(help="Revision of a hub dataset.", rich_help_panel=DATA)
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset or of a folder.", rich_help_panel=DATA)] = "train",
    column: Annotated[
        str | None,
        typer.Option(
            help="The column of texts or of token ids.", show_default="text, input_ids or tokens", rich_help_panel=DATA
        ),
    ] = None,
    sample_by: Annotated[
        str,
        typer.Option(help="A document of a text file is a line, a paragraph or a document.", rich_help_panel=DATA),
    ] = "document",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read a hub dataset without downloading it first.", rich_help_panel=DATA)
    ] = False,
    on_bad_row: Annotated[
        str,
        typer.Option(
            help="At a row that holds no text or token ids: fail, or skip it and count it.", rich_help_panel=DATA
        ),
    ] = "fail",
    prepend_bos: Annotated[bool, typer.Option(help="Begin every sequence with BOS.", rich_help_panel=DATA)] = True,
    separator: Annotated[
        str, typer.Option(help="The token between two documents: bos, eos or none.", rich_help_panel=DATA)
    ] = "bos",
    repack: Annotated[
        bool,
        typer.Option(
            "--repack", help="Pack rows of token ids anew that have --context-size ids.", rich_help_panel=DATA
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order of rows and of the holdout.", rich_help_panel=CACHE)] = 0,
    holdout: Annotated[
        float, typer.Option(help="Share of documents that go to the validation split.", rich_help_panel=DATA)
    ] = 0.01,
    backend: Annotated[
        str,
        typer.Option(
            help="hf is fast and has the residual stream. transformer_lens has every other hook.", rich_help_panel=MODEL
        ),
    ] = "hf",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Be process I of N that share this cache.",
            show_default="as torchrun or srun say",
            rich_help_panel=CACHE,
        ),
    ] = None,
    no_lock: NoLock = False,
    estimate: Annotated[
        bool, typer.Option("--dry-run", help="Estimate bytes and time, then stop.", rich_help_panel=CACHE)
    ] = False,
    from_saelens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take what is not given here from a training config of SAELens: JSON, YAML or Python.",
            callback=options_of_saelens,
            is_eager=True,
            rich_help_panel=DATA,
        ),
    ] = None,
) -> None:
    """Run the model once and store every asked hook.

    A finished cache that holds them is reused. A new hook is added over its tokens. More tokens make it grow.
    """
    require_room_for("transformers")
    from actcache.commands.lines import cache_lines, estimate_line
    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.plan import refuse_hopeless
    from actcache.harvesting.run import dry_run, harvest_share
    from actcache.harvesting.tasks import refuse_foreign_folder
    from actcache.models.load import load_model
    from actcache.text.sources import DatasetSource

    config = HarvestConfig(
        hook_names=tuple(hook),
        tokens=tokens,
        context_size=context_size,
        codec=codec,
        dtype=dtype,
        batch_size=batch_size,
        prepend_bos=prepend_bos,
        separator=separator,
        repack=repack,
        seed=seed,
        holdout=holdout,
    )
    source = DatasetSource(
        path=dataset,
        config=dataset_config,
        split=split,
        revision=dataset_revision,
        column=column,
        sample_by=sample_by,
        streaming=streaming,
        on_bad_row=on_bad_row,
    )
    share = this_worker(worker)
    if no_lock and share.count > 1:
        raise ConfigError(f"harvest: --no-lock is for one process alone, got worker {share.index}/{share.count}")
    refuse_foreign_folder(out)  # before a model is loaded
    if not estimate:
        refuse_hopeless(out, config.tokens, config.hook_names)
    language_model = load_model(
        model,
        revision=revision,
        adapter=adapter,
        device=local_device(device, device_map),
        device_map=device_map,
        dtype=model_dtype,
        attention=attention,
        compile=compiled,
        backend=backend,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    note_model(language_model)
    note_named("dataset", source.path, source.revision)
    if estimate:
        return say(estimate_line(dry_run(language_model, source, config, out)))
    with locking(out, no_lock), closing(Bar("harvest", "tok")) as progress:
        cache = harvest_share(language_model, source, config, out, share, progress=progress)
    if cache is not None:
        say(f"{out} is finished" if progress.touched else f"{out} was already there, nothing was done")
        say(*cache_lines(cache))
