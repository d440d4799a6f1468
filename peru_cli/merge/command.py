"""`peru merge`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Optional

import typer

from peru_cli import options
from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.merge import options as settings
from peru_cli.merge import recipe as recipes
from peru_cli.merge.given import Given, build_by_tensor, first_parameters, shown
from peru_cli.merge.help import HelpByMethod
from peru_cli.merge.search.asked import Examples, Searching
from peru_cli.merge.search.space import parse_ranges
from peru_cli.merge.search.typed import at, check_tasks, first_point, typed_dimensions, with_ranges
from peru_cli.merge.show import list_methods_and_exit, say, summary
from peru_cli.methods.lora.table import SPACES
from peru_cli.methods.table import METHODS, effective_values, find_method
from peru_cli.methods.then.table import PASSES, build_pass
from peru_cli.publish.command import destination, publish

FP8 = "fp8"


@options.shared(
    panels={
        "Inputs": "base rename tokenizer pad_vocab_to config",
        "Method": "method weight then lora list_methods per_task merge_heads strict",
        "Data": "data stats batch_size trust_remote_code",
        "Output": "output compress dtype max_shard_size base_id write_recipe",
    }
)
def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[TASK=]MODEL...", help="Models, PEFT LoRA adapters or peru artifacts; or one recipe.yml.", show_default=False
        ),
    ],
    *,
    base: options.OptionalBase = None,
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="A folder, or a single file.safetensors.")],
    method: Annotated[
        Optional[str],
        typer.Option("--method", "-m", metavar="METHOD", help=f"One of {len(METHODS)}: see --list-methods.", show_default=False),
    ] = None,
    weight: Annotated[
        Optional[list[str]],
        typer.Option("--weight", "-w", metavar="TASK=W", help="Weight of a task, or a='mlp:0.7,0.3' by tensor. Repeatable. Default: 1."),
    ] = None,
    data: Annotated[
        Optional[list[str]],
        typer.Option("--data", "-d", metavar="TASK=FILE", help="Examples of a task, for --search and methods that use data. Repeatable."),
    ] = None,
    stats: Annotated[
        Optional[str], typer.Option("--stats", metavar="DIR", help="Cache for the statistics that methods collect from data.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Examples per forward pass.")] = 16,
    trust_remote_code: options.TrustRemoteCode = False,
    compress: Annotated[
        Optional[str],
        typer.Option(
            "--compress", metavar="DENSITY", help="PERU-FFT: write OUT/merged/, and each task pruned against it as OUT/TASK.safetensors."
        ),
    ] = None,
    then: Annotated[
        Optional[str],
        typer.Option(
            "--then", metavar="PASS", help=f"A pass over the merged tensors. {'; '.join(f'{n}: {p.title}' for n, p in PASSES.items())}."
        ),
    ] = None,
    lora: Annotated[
        Optional[str],
        typer.Option("--lora", metavar="|".join(SPACES), help="Merge LoRA adapters into one adapter, aligned by KnOTS or in Core Space."),
    ] = None,
    per_task: Annotated[
        Optional[str],
        typer.Option("--per-task", metavar="REGEX", help="Do not merge tensors whose names match: keep each task's own (heads)."),
    ] = None,
    merge_heads: Annotated[bool, typer.Option("--merge-heads", help="Without a base: average classifier heads, too.")] = False,
    rename: options.Rename = None,
    tokenizer: Annotated[
        Optional[str],
        typer.Option("--tokenizer", metavar="union|base|TASK", help="Align embedding and head rows by token; write this vocabulary."),
    ] = None,
    pad_vocab_to: Annotated[
        Optional[int], typer.Option("--pad-vocab-to", min=1, metavar="N", help="With --tokenizer: pad the rows to a multiple of N.")
    ] = None,
    config: Annotated[
        Optional[str], typer.Option("--config", metavar="TASK|base", help="Whose config.json to use if the models' configs conflict.")
    ] = None,
    dtype: Annotated[
        Optional[str],
        typer.Option(
            "--dtype",
            metavar="bf16|fp16|fp32|fp64|fp8",
            help="Data type of the output; fp8 needs an FP8 base and writes its layout. Default: that of the inputs.",
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest size of a shard.")] = "5GB",
    base_id: Annotated[
        Optional[str], typer.Option("--base-id", metavar="ID", help="The base's public name for the model card, e.g. org/name.")
    ] = None,
    write_recipe: Annotated[
        Optional[str],
        typer.Option("--write-recipe", metavar="FILE", help="Write this command as a mergekit recipe; with --dry-run, write only that."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Recipes: refuse keys that have no effect, instead of warning.")] = False,
    list_methods: Annotated[
        bool,
        typer.Option("--list-methods", callback=list_methods_and_exit, is_eager=True, help="List all methods with their options."),
    ] = False,
    searching: Searching,
    cluster: options.Cluster,
    publishing: options.Publishing,
    run: options.Running,
    **typed: Any,
) -> None:
    """Merge several models into one; with --compress, store the models as small deltas of it (PERU-FFT).

    peru merge a=MODEL b=MODEL --base BASE -o merged/ --method task-arithmetic --scale 0.3

    peru merge a=MODEL b=MODEL --base BASE -o merged/ --method ties --keep 20%

    peru merge a=MODEL b=MODEL -o soup/ --method linear --weight a=0.7 --weight b=0.3

    peru merge a=MODEL b=MODEL --base BASE -o fft/ --method ties --compress 5%

    peru merge recipe.yml -o merged/ --dry-run

    peru merge a=ADAPTER b=ADAPTER -o adapter/ --method ties --lora core-space

    peru merge a=MODEL b=MODEL --base BASE -o m/ --method fisher --data a=a.jsonl --data b=b.jsonl --stats stats/

    peru merge a=MODEL b=MODEL --base BASE -o m/ --method ties --search scale=0:1:0.05 --data a=a.jsonl --data b=b.jsonl

    If a merge was killed, type the same command again to continue it; --force starts afresh.
    """
    given, varied = settings.given_values(typed)
    searching.check(bool(data))
    address = cluster.address(run.device)
    if address is not None:
        settings.refuse_on_a_cluster(
            recipe=len(models) == 1 and recipes.is_recipe(models[0]), data=data, stats=stats, search=searching.search, then=then, lora=lora,
            tokenizer=tokenizer, compress=compress, **{"dtype fp8": dtype == FP8},
        )  # fmt: skip
    ranges = parse_ranges(searching.search, searching.trials is not None) if searching.search is not None else []
    if len(models) == 1 and recipes.is_recipe(models[0]):
        of_search: dict[str, object] = {"data": data, "write-recipe": write_recipe, "trust-remote-code": trust_remote_code or None}
        settings.refuse_beside_a_recipe(
            given, bool(ranges), of_search, method=method, base=base, weight=weight, stats=stats, compress=compress, rename=rename,
            tokenizer=tokenizer, then=then, lora=lora, **{"pad-vocab-to": pad_vocab_to},
        )  # fmt: skip
        if ranges and not data and searching.metric_command is None:
            raise UsageError("--search needs examples", "add --data MODEL=FILE, or --metric-command CMD")
        from peru_cli.merge.recipe.plan import Wanted
        from peru_cli.merge.recipe.run import Asked, merge_recipe

        if dtype == FP8:
            raise UsageError(
                "--dtype fp8 cannot be combined with a recipe", "name models and --method instead, with an FP8 model as --base"
            )
        options.check_base_id(base_id)
        place = destination(publishing, run.force, output)
        asked = Asked(
            output, options.parse_dtype(dtype) if dtype is not None else None, Wanted(per_task, merge_heads, config),
            options.parse_size(max_shard_size, "--max-shard-size"), strict, run, searching, ranges,
            Examples(data or [], batch_size, given.get("max-samples"), int(given.get("seed", 0)), trust_remote_code), write_recipe,
        )  # fmt: skip
        merged = merge_recipe(models[0], asked)
        console.result(merged if run.dry_run else merged | publish(place, [Path(output)], "merge"))
        return
    if method is None:
        raise UsageError("no --method is given", "name one of --list-methods, or a recipe: peru merge recipe.yml -o merged/")
    if strict:
        raise UsageError("--strict works with recipes only", "leave it out")
    if method in SPACES:
        raise UsageError(f"{method} aligns LoRAs for another method to merge", f"write --lora {method} --method ties, or another method")
    chosen = find_method(method)
    samples, seed = given.get("max-samples"), int(given.get("seed", 0))
    for name in ("max-samples", "seed") if ranges else ():
        if name not in chosen.options:
            given.pop(name, None)  # they are for the search
    if weight and "weight" not in chosen.options:
        effective_values(chosen, {"weight": 1.0})
    varied.add("weight", weight or [])
    values = effective_values(chosen, given)
    settings.check_varied(varied, chosen, given, values)
    if then is not None:
        settings.check_then(then, base or lora, searching.search, write_recipe)
    if lora is not None:
        from peru_cli.merge.adapters.command import merge_loras

        place = destination(publishing, run.force, output)
        made = merge_loras(
            models, lora, chosen, (varied, values), {"base": base, "dtype": dtype, "then": then, "output": output}, run, data=data,
            stats=stats, search=searching.search, compress=compress, rename=rename, tokenizer=tokenizer, config=config,
            **{
                "per-task": per_task, "merge-heads": merge_heads, "pad-vocab-to": pad_vocab_to, "base-id": base_id,
                "write-recipe": write_recipe, "trust-remote-code": trust_remote_code,
            },
        )  # fmt: skip
        console.result(made if run.dry_run else made | publish(place, [Path(output)], "merge"))
        return
    dimensions = typed_dimensions(ranges, chosen, given, varied)
    measures = bool(ranges) and searching.metric_command is None
    if data and chosen.statistics is None and not measures:
        raise UsageError(f"{method} uses no data", "leave --data out, or search an option on it: --search OPTION=FROM:TO:STEP")
    if not data and (chosen.statistics is not None or measures):
        what = f"{method}" if chosen.statistics is not None else "--search"
        raise UsageError(f"{what} needs examples of every task", "add --data TASK=FILE for each task")
    if trust_remote_code and not data:
        raise UsageError("--trust-remote-code is for models that run on --data", "leave it out: this merge runs no model")
    density = options.parse_density(compress, "--compress") if compress is not None else None
    if base is None and (chosen.needs_base or density is not None):
        raise UsageError(f"{method if chosen.needs_base else '--compress'} needs a base", "add --base BASE")
    options.check_base_id(base_id)
    shard_bytes = options.parse_size(max_shard_size, "--max-shard-size")
    wanted = options.parse_dtype(dtype) if dtype not in (None, FP8) else None
    if dtype == FP8 and density is not None:
        raise UsageError("--compress cannot be combined with --dtype fp8", "leave --dtype out: artifacts need a base of floats")
    if address is None and not run.dry_run:
        from peru_cli.kernels.compiling.build import begin_beside

        begin_beside()

    from peru_cli.checkpoints.hub.session import stream_hub
    from peru_cli.checkpoints.local.atomic import check_room, check_target, partial_path
    from peru_cli.checkpoints.resolve import default_task, split_arguments
    from peru_cli.finetunes.nodes import Sources, There
    from peru_cli.finetunes.verify import verify_expanded
    from peru_cli.merge import output as out
    from peru_cli.merge.cautions import cautions, idle
    from peru_cli.merge.nodes import MergeSources, check_spread
    from peru_cli.merge.passes.matrices import check_memory
    from peru_cli.merge.passes.run import DEFAULT_TILE, check_trims
    from peru_cli.merge.passes.then import check_memory as check_room_for
    from peru_cli.merge.plan import Options, check_same, plan_merge
    from peru_cli.merge.recipe.write import Typed, check_path, recipe_text, write_text
    from peru_cli.methods.parameters import Parameters
    from peru_cli.methods.rules import Rule
    from peru_cli.streaming.cluster import cluster_at
    from peru_cli.vectors.settings import streaming

    arguments = split_arguments(models)
    names = tuple(a.task or default_task(a.model) for a in arguments)
    least, most = chosen.tasks
    if len(names) < least or (most is not None and len(names) > most):
        raise UsageError(f"{method} takes {least if most == least else f'at least {least}'} models, not {len(names)}")
    settings.check_names(names, base is not None, config, tokenizer, pad_vocab_to)
    if tokenizer is not None and (density is not None or data):
        other = "--compress" if density is not None else "--data"
        raise UsageError(f"--tokenizer cannot be combined with {other}", "merge first, then continue with the merged model")
    varied.check_tasks(names)
    check_tasks(dimensions, names)
    parameters = first_parameters(varied, Parameters(names, (1.0,) * len(names), values, has_base=base is not None))
    before = varied, parameters
    varied, parameters = at(dimensions, first_point(dimensions), *before)
    rule = chosen.build(parameters)
    if then is not None:
        settings.check_follows(then, rule, chosen.name)
    for warning in () if varied.by_tensor or dimensions else idle([parameters]):
        console.warn(warning)
    target = Path(output)
    as_file = target.suffix == ".safetensors"
    if as_file and density is not None:
        raise UsageError("--compress writes a folder: merged/ and one artifact per task", "end -o in /")
    if density is not None and any(name.lower() == "merged" for name in names):
        raise UsageError("with --compress, the name 'merged' is reserved for the merged model", "give the task another name")
    check_target(target, run.force or run.dry_run)
    if write_recipe is not None:
        check_path(Path(write_recipe), run.force)
    place = destination(publishing, run.force, output)

    if address is not None:
        stream_hub()
    models_given = Sources(base, tuple(arguments), tuple(rename or ())).open()
    opened_base, opened = models_given.base, models_given.given
    fp8 = settings.layout_of(opened_base if opened_base is not None else opened[0]) if dtype == FP8 else None
    tasks = list(zip(names, models_given.fines, strict=True))
    for line in models_given.said:
        console.note(line)
    if fp8 is not None and opened_base is None and tasks[0][1] is not opened[0]:
        raise UsageError("--dtype fp8 with --rename needs a base, whose names are kept", "add --base BASE")
    if tokenizer is not None:
        if fp8 is not None and (found := fp8.vocabulary()) is not None:
            raise UsageError(
                f"--tokenizer changes rows of {found}, which is FP8 in the base", "leave --dtype out: rows of floats are aligned"
            )
        from peru_cli.finetunes.revocabulary import common_vocabulary

        everyone = [*([("base", opened_base)] if opened_base is not None else []), *tasks]
        aligned, said = common_vocabulary(everyone, opened_base is not None, tokenizer, pad_vocab_to or 1)
        opened_base = aligned[0] if opened_base is not None else None
        tasks = list(zip(names, aligned[-len(names) :], strict=True))
        for line in said:
            console.note(line)
    asked_for = Options(per_task, merge_heads, wanted, fp8, config=config)
    plan = plan_merge(opened_base, tasks, rule.on_vectors, asked_for)
    if varied.by_tensor:
        rule = build_by_tensor(chosen, varied, parameters, [slot.info.name for slot in plan.slots])
    check_trims(plan, rule)
    check_memory(plan, rule)
    if address is not None:
        check_spread(plan, rule, chosen.name)
    if then is not None:
        plan.then = build_pass(then)
        check_room_for(plan, plan.then)
    if as_file and any(plan.heads.values()):
        raise UsageError("a single file cannot hold per-task tensors", "write a folder with -o OUT/: they go to OUT/heads/TASK.safetensors")
    if not partial_path(target).exists():  # otherwise a killed run has already taken the space
        check_room(target, sum(info.nbytes for info in plan.written))
    extra = settings.words(
        per_task=per_task, merge_heads=merge_heads, rename=rename, tokenizer=tokenizer, pad_vocab_to=pad_vocab_to, config=config,
        dtype=dtype, compress=out.show(density) if density else None,
    )  # fmt: skip
    seen = [f"{text.partition('=')[0]}={Path(text).name}" for text in data or ()]
    if chosen.statistics is not None:
        extra += [word for text in seen for word in ("--data", text)]
    base_name = (base_id or opened_base.public_name or default_task(base)) if base is not None and opened_base is not None else None

    def record(varied: Given, parameters: Parameters) -> out.Recipe:
        words, weights, own = shown(varied, parameters.values, parameters.weights, names)
        words = words | ({"then": then} if then is not None else {})
        weighted = weights if "weight" in chosen.options else None
        return out.Recipe(chosen.name, chosen.paper, names, weighted, words, base_name, tuple(extra), shard_bytes, own=own)

    recipe = record(varied, parameters)
    say(plan, with_ranges(recipe, dimensions), chosen, opened_base, tasks)
    zeros = idle(rule.at(number).parameters for number in range(len(plan.slots))) if varied.by_tensor else []
    for warning in [*zeros, *cautions(plan, rule), *check_same(plan)]:
        console.warn(warning)
    running = None
    if data:
        from peru_cli.inference.task_models import read_data

        limit = int(samples) if samples is not None else None
        running = read_data(data, names, run.device, batch_size, method if chosen.statistics else "--search", limit)

    def recipe_of(varied: Given, parameters: Parameters) -> None:
        """Write what is typed as a recipe."""
        models = [(name, argument.model) for name, argument in zip(names, arguments, strict=True)]
        every = [slot.info.name for slot in plan.slots]
        text, otherwise = recipe_text(Typed(chosen, base, models, parameters.values, varied, every, plan.slots[0].info.dtype))
        for line in otherwise:
            console.warn(f"{write_recipe}: {line}")
        write_text(Path(write_recipe or ""), text)

    if write_recipe is not None and (run.dry_run or not dimensions):
        recipe_of(varied, parameters)
    if run.dry_run:
        console.note(f"the weights would take {si_bytes(sum(info.nbytes for info in plan.written))}")
        console.result(summary(plan, recipe, target))
        return
    results, searched = [], None
    total = plan.entries * ((3 if rule.trims else 1) + (plan.then is not None and plan.then.gathers))
    tiles = run.tile_entries or DEFAULT_TILE
    collects = chosen.statistics is not None and stats is None
    with (
        TemporaryDirectory(prefix="peru-statistics-") if collects else nullcontext(stats or "") as folder,
        console.progress(total, "merge") as progress,
        cluster_at(
            address, lambda: MergeSources(There.of(models_given), names, chosen.name, varied, parameters, asked_for, tiles)
        ) as elsewhere,
        streaming(run.device if address is None else "cpu", run.threads, tiles, progress.advance, elsewhere) as how,
    ):
        verify_expanded(opened, how, progress.step)
        if running is not None or dimensions:
            from peru_cli.inference.remote_code import trusting
            from peru_cli.merge.data.collect import Builder
            from peru_cli.merge.data.statistics import Progress
            from peru_cli.merge.search.command import search_options

            all_models = [*(a.model for a in arguments), *([base] if base is not None else [])]
            with trusting(all_models, trust_remote_code):
                builder = Builder(plan, chosen, running, Path(folder), Progress(console.note, progress.expect, progress.advance))

                def build(varied: Given, parameters: Parameters) -> Rule:
                    if varied.by_tensor:
                        return build_by_tensor(chosen, varied, parameters, [slot.info.name for slot in plan.slots])
                    return builder.build(parameters)

                if dimensions:
                    first = f", the first {samples} examples of each" if samples is not None else ""
                    used = (running, f"{', '.join(seen)}{first}") if running is not None and measures else None
                    searched = search_options(
                        searching, dimensions, seed, plan, before, build, record, used, how, target.absolute().parent, progress
                    )
                    varied, parameters = at(dimensions, searched.point, *before)
                rule, recipe = build(varied, parameters), replace(record(varied, parameters), statistics=builder.keys(parameters))
            if searched is not None:
                recipe = replace(recipe, searched=searched.words(), chosen_by=searched.chosen_by())
                if write_recipe is not None:
                    recipe_of(varied, parameters)
        where = out.Where(target, run.sync, run.force, progress.step, console.note)
        if density is not None:
            results = out.write_compressed(plan, rule, recipe, where, density, how)
        else:
            (out.write_file if as_file else out.write_directory)(plan, rule, recipe, where, how)
    if searched is not None:
        from peru_cli.merge.search.show import as_json, show_search

        show_search(searched)
    console.line(f"{target}: {plural(len(plan.written), 'tensor')}, {si_bytes(sum(info.nbytes for info in plan.written))}")
    for result in results:
        bits = f"{count(result.kept)} entries, {result.bits_per_parameter:.3f} bits/param"
        console.line(f"{result.path}: {si_bytes(result.file_bytes)}, {bits}")
    artifacts = [{"task": r.task, "path": str(r.path), "file_bytes": r.file_bytes, "kept": r.kept} for r in results]
    report = summary(plan, recipe, target) | ({"artifacts": artifacts} if results else {})
    if searched is not None:
        report["search"] = as_json(searched)
    console.result(report | publish(place, [target], "merge"))


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=HelpByMethod)(settings.with_method_options(merge, after="weight"))
