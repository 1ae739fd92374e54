"""Make an evaluation from recipes and labelled shards: build → embed in one pass → figures, heads, relations."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lora_embed.chain import cluster, pipeline
from lora_embed.errors import ConfigError
from lora_embed.evaluate import candidates, figures, verdict
from lora_embed.evaluate.candidates import AdapterHead, Built, Entrant
from lora_embed.evaluate.collect import Collected, Source, check_fields, collect
from lora_embed.evaluate.figures import Labelled, Scored, cka_relations, tasks_of
from lora_embed.evaluate.records import ClassChange, Difference, Evaluation, Figure, QueryChange, Relation, Retention
from lora_embed.evaluate.request import Request, check_request
from lora_embed.evaluate.thumbnails import thumbnails
from lora_embed.monitor.progress import say
from lora_embed.run.refuse import local_places, refuse_unshared
from lora_embed.store.fetch import private_folder
from lora_embed.store.store import Store
from lora_embed.table.rejects import describe_rejects
from lora_embed.text import agree, number_of, utc

MOST_ALIGNED = 2000  # images on which the vectors of two encoders are compared by CKA


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The embedded images, classes, splits and heads that figures are computed from."""

    labelled: Labelled
    collected: Collected
    rows: NDArray[np.int64]  # rows of the collected samples that `labelled` holds
    built: tuple[Built, ...]  # the candidates in order, then the single adapters that only heads need
    heads: tuple[tuple[AdapterHead, str, list[str]], ...]  # each head with its task and the class of each output

    def vectors(self, built: Built) -> NDArray[np.float32]:
        """A candidate's vectors, in the order of `labelled`."""
        return self.collected.embedded[built.encoder.space_id].vectors[self.rows]


def assess(request: Request) -> Evaluation:
    """Evaluate a request. Raises ConfigError for a wrong request or unsuitable data, IncompleteRun for unreadable shards."""
    started = time.perf_counter()
    check_request(request)
    entrants = candidates.find_entrants(request.recipes, alone=request.alone)
    names = [entrant.name for entrant in entrants]
    if request.reference is not None and request.reference not in names:
        raise ConfigError(f"--reference {request.reference}: is not a candidate; choose from {', '.join(names)}")
    source, topology = open_source(request)
    prepared = prepare(request, entrants, source, topology)
    labelled, collected = prepared.labelled, prepared.collected
    built = prepared.built[: len(entrants)]
    vectors = [prepared.vectors(candidate) for candidate in built]
    clock = time.perf_counter()
    scored = dict(zip(names, pipeline.map_tasks(figures.score, (prepared.labelled,), vectors), strict=True))
    metrics_s = time.perf_counter() - clock
    records = [
        candidates.candidate_of(candidate, collected.embedded[candidate.encoder.space_id].forward_s) for candidate in built
    ]
    reference = request.reference or verdict.default_reference(records)
    clock = time.perf_counter()
    relations = relate(entrants) + cka_relations(_alone(prepared, built))
    relate_s = time.perf_counter() - clock
    changed = _changed(labelled, scored, reference)
    return Evaluation(
        created=utc(),
        inputs=request.inputs,
        samples=collected.samples.num_rows,
        decoded=collected.decoded,
        rejects=collected.rejects,
        seconds=collected.seconds | {"metrics": metrics_s, "relate": relate_s, "all": time.perf_counter() - started},
        splits=len(labelled.banks),
        bank_share=float(np.mean([bank.mean() for bank in labelled.banks])),
        seed=request.seed,
        tasks=tasks_of(labelled.classes, labelled.labels),
        candidates=tuple(records),
        reference=reference,
        figures=_figures(labelled, scored),
        differences=_differences(labelled, scored, verdict.pairs_of(records, reference)),
        retention=_retention(prepared, built),
        classes=_class_changes(labelled, scored, reference),
        relations=relations,
        queries=changed,
        thumbnails=thumbnails(changed, source),
    )


def open_source(request: Request) -> tuple[Source, cluster.Topology]:
    """List the input, check that it has the fields, and join the cluster."""
    work = request.work if request.work is not None else str(private_folder("evaluate"))
    store = Store(work, request.work_options)
    options = [("--label", name) for name in request.labels]
    options += [(option, name) for option, name in (("--group", request.group), ("--split", request.split)) if name]
    fields = [name for _, name in options]
    shards, layout = request.listing(fields).shards, request.layout(fields)
    source = Source(shards=tuple(shards), options=request.input_options, store=store, layout=layout)
    check_fields(source, options)
    store.check_reachable()
    store.check_writable()
    cluster.connect()
    topology = cluster.choose_topology(request.resources)
    if not request.shared_filesystem:
        refuse_unshared(
            local_places(store, source.shards, request.input_options),
            "Use URIs that all nodes reach for --data and --work, such as s3://…, or add --shared-filesystem if all nodes "
            "mount the path.",
        )
    device = pipeline.ask_device(topology)
    precision = device.precision if request.precision == "auto" else request.precision
    return replace(source, layout=replace(layout, precision=precision, batch_size=device.batch_size)), topology


def prepare(request: Request, entrants: Sequence[Entrant], source: Source, topology: cluster.Topology) -> Prepared:
    """Build all encoders, embed all images with each, and find classes, groups, splits and heads."""
    heads: list[AdapterHead] = []
    if request.judges_heads:
        heads, notes = candidates.find_heads(entrants)
        for note in notes:
            say(f"note: {note}")
    of_heads = [head.entrant for head in heads]
    built = [candidates.build(entrant, source.store) for entrant in [*entrants, *of_heads]]
    by_space = {encoder.encoder.space_id: candidates.want(encoder, heads, source.store) for encoder in built}
    collected = collect(source, list(by_space.values()), topology)
    labelled = label(request, collected)
    return Prepared(
        labelled=labelled,
        collected=collected,
        rows=np.flatnonzero(collected.good),
        built=tuple(built),
        heads=tuple(_with_tasks(request, heads, labelled)),
    )


def label(request: Request, collected: Collected) -> Labelled:
    """Classes, groups and splits of the samples that have vectors. Raises ConfigError for labels that cannot be used."""
    embedded_samples = collected.samples.filter(collected.samples.column("reason").is_null())
    if not embedded_samples.num_rows:
        raise ConfigError(
            f"none of {number_of(collected.samples.num_rows, 'sample')} could be embedded; rejects by reason: "
            f"{describe_rejects(collected.rejects)}. Correct the input."
        )
    columns = {name: embedded_samples.column(name).to_pylist() for name in embedded_samples.column_names}
    ids = columns["id"]
    twice = [sample_id for sample_id, count in Counter(ids).items() if count > 1]
    if twice:
        raise ConfigError(
            f"{number_of(len(twice), 'id')} {agree(len(twice), 'belongs', 'belong')} to several images, such as {twice[0]}. "
            "Rename one image of each, or leave it out."
        )
    names = (
        ids
        if request.group is None
        else [sample_id if name is None else name for sample_id, name in zip(ids, columns[request.group], strict=True)]
    )
    classes = {task: figures.classes_of(columns[task]) for task in request.labels}
    if request.split is not None:
        banks = figures.own_split(columns[request.split], request.split)
    else:
        banks = figures.seeded_splits(names, request.splits, request.seed)
    place = {name: number for number, name in enumerate(sorted(set(names)))}
    labelled = Labelled(
        ids=tuple(ids),
        classes={task: encoded for task, (encoded, _) in classes.items()},
        labels={task: encoded for task, (_, encoded) in classes.items()},
        groups=np.array([place[name] for name in names], np.int64),
        banks=banks,
        bank_share=None if request.split else figures.BANK_SHARE,
    )
    figures.check_sides(labelled)
    return labelled


def _with_tasks(request: Request, heads: Sequence[AdapterHead], labelled: Labelled) -> list[tuple[AdapterHead, str, list[str]]]:
    """Each head with its task: the one that the user named, or else the only task whose classes fit its outputs."""
    with_tasks = []
    for head in heads:
        task_of_head = request.heads.get(head.adapter)
        orders = {}
        for task in [task_of_head] if task_of_head else request.labels:
            saved = [head.names[n] for n in sorted(head.names)] if head.names else None
            order = figures.head_order(labelled.classes[task], head.head.classes, request.head_classes.get(task) or saved)
            if order is not None:
                orders[task] = order
        if len(orders) == 1:
            with_tasks += [(head, task, order) for task, order in orders.items()]
            continue
        has = f"its {number_of(head.head.classes, 'output')} fit"
        why = f"{has} several tasks: {', '.join(orders)}" if orders else f"{has} the classes of no task"
        say(
            f"note: the head of adapter {head.adapter} is not judged, since {why}. If one is its task, name it with --head "
            f"{head.adapter}=FIELD, and the order of its outputs with --classes FIELD=FILE."
        )
    return with_tasks


def _pairs(
    labelled: Labelled, scored: dict[str, dict[str, Scored]], reference: str
) -> list[tuple[str, str, dict[str, Scored]]]:
    """Each task with each candidate except the reference, and the reference's scores."""
    return [(task, name, scored[reference]) for task in labelled.labels for name in scored if name != reference]


def _figures(labelled: Labelled, scored: dict[str, dict[str, Scored]]) -> tuple[Figure, ...]:
    by_candidate = [
        figures.figures_of(labelled, task, name, scores[task]) for task in labelled.labels for name, scores in scored.items()
    ]
    return tuple(figure for of_candidate in by_candidate for figure in of_candidate)


def _differences(
    labelled: Labelled, scored: dict[str, dict[str, Scored]], pairs: Sequence[tuple[str, str]]
) -> tuple[Difference, ...]:
    return tuple(
        difference
        for task in labelled.labels
        for pair in pairs
        for difference in figures.differences_of(labelled, task, pair, *(scored[name][task] for name in pair))
    )


def _class_changes(labelled: Labelled, scored: dict[str, dict[str, Scored]], reference: str) -> tuple[ClassChange, ...]:
    return tuple(
        change
        for task, name, of_reference in _pairs(labelled, scored, reference)
        for change in figures.class_changes(labelled, task, (name, reference), scored[name][task], of_reference[task])
    )


def _retention(prepared: Prepared, built: Sequence[Built]) -> tuple[Retention, ...]:
    """Compare every head on every candidate that it fits with the same head on its own adapter."""
    answers = {
        (space_id, head_id): classes[prepared.rows]
        for space_id, embedded in prepared.collected.embedded.items()
        for head_id, classes in embedded.classes.items()
    }
    space_of_recipe = {
        candidate.entrant.ingredients.recipe_id: candidate.encoder.space_id
        for candidate in prepared.built
        if candidate.entrant.ingredients
    }
    kept_heads = []
    for head, task, order in prepared.heads:
        ingredients = head.entrant.ingredients
        assert ingredients is not None
        on_adapter = answers[space_of_recipe[ingredients.recipe_id], head.head_id]
        for candidate in built:
            on_candidate = answers.get((candidate.encoder.space_id, head.head_id))
            if on_candidate is not None:
                names = (task, head.adapter, candidate.entrant.name)
                kept_heads.append(figures.retention_of(prepared.labelled, names, order, on_adapter, on_candidate))
    return tuple(kept_heads)


def _changed(labelled: Labelled, scored: dict[str, dict[str, Scored]], reference: str) -> tuple[QueryChange, ...]:
    return tuple(
        change
        for task, name, of_reference in _pairs(labelled, scored, reference)
        for change in figures.query_changes(labelled, task, (name, reference), scored[name][task], of_reference[task])
    )


def _alone(prepared: Prepared, built: Sequence[Built]) -> dict[str, NDArray[np.float32]]:
    """Vectors of the base and of single adapters, by name."""
    return {
        candidate.entrant.name: prepared.vectors(candidate)[:MOST_ALIGNED]
        for candidate in built
        if len(candidate.entrant.recipe.adapters) <= 1
    }


def relate(entrants: Sequence[Entrant]) -> tuple[Relation, ...]:
    """How similar the weights of all adapters of one base are, over all layers and by layer."""
    from lora_embed.model.relate import relate_adapters

    relations = []
    for ingredients, adapters in candidates.related(entrants).values():
        names = list(adapters)
        for kind, first, second, layer, value in relate_adapters(ingredients.base, list(adapters.values())):
            relations.append(Relation(kind=kind, one=names[first], other=names[second], layer=layer, value=value))
    return tuple(relations)
