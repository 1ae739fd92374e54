"""An evaluation for tests of what shows one: small, every kind of record in it, names through a function of the test's."""

import base64
from collections.abc import Callable

from lora_embed.evaluate.records import (
    Candidate,
    ClassChange,
    Difference,
    Evaluation,
    Figure,
    Neighbour,
    QueryChange,
    Relation,
    Retention,
    Task,
    Trial,
)
from samples import encoded, noise

Naming = Callable[[str], str]
TASKS, CLASSES = ("category", "group"), ("activities", "flags", "food", "symbols", "travel")
CANDIDATES = {"base": {}, "halves": {"ten": 0.5, "more": 0.5}, "ties": {"ten": 1.0, "more": 1.0}}
MEANS = {("category", "knn"): (0.700, 0.731, 0.688), ("category", "probe"): (0.75, 0.77, 0.752)}
MEANS |= {("group", "knn"): (0.612, 0.613, 0.655), ("group", "probe"): (0.66, 0.65, 0.671)}
HALF = 0.014  # of an interval
METHODS = ("none", "weighted_sum", "ties")


def evaluation(called: Naming = str) -> Evaluation:
    """Two tasks, three encoders of which the base is the reference, 12 trials."""
    names = [called(one) for one in CANDIDATES]
    return Evaluation(
        created="2026-11-27T09:40:12+00:00",
        inputs=(called("s3://images/{00000..00007}.tar"),),
        samples=503,
        decoded=500,
        rejects={called("corrupt_image"): 2, "empty": 1},
        seconds={"read": 0.8, "decode": 3.1, called("forward"): 88.0},
        splits=5,
        bank_share=2 / 3,
        seed=0,
        tasks=tuple(
            Task(name=called(task), label=called("label"), classes=tuple(map(called, CLASSES)), images=500) for task in TASKS
        ),
        candidates=tuple(_candidate(number, called) for number in range(len(CANDIDATES))),
        reference=names[0],
        figures=tuple(_figures(names, called)),
        differences=tuple(_differences(names, called)),
        retention=tuple(
            Retention(
                task=called(task),
                adapter=called(adapter),
                candidate=name,
                own=0.8,
                kept=0.76,
                low=-0.06,
                high=-0.02,
                images=150,
            )
            for task, adapter in zip(TASKS, ("ten", "more"), strict=True)
            for name in names[1:]
        ),
        classes=tuple(_classes(names, called)),
        relations=tuple(_relations(called)),
        queries=tuple(_queries(names, called)),
        trials=tuple(_trials(called)),
        thumbnails={called(f"image-{number}"): _thumbnail(number) for number in range(6)},
    )


def _candidate(number: int, called: Naming) -> Candidate:
    name, weights = list(CANDIDATES.items())[number]
    return Candidate(
        name=called(name),
        method=called(METHODS[number]),
        weights={called(adapter): weight for adapter, weight in weights.items()},
        options={called("density"): called("0.2")} if name == "ties" else {},
        recipe_id=f"{number:012x}",
        space_id=f"{number + 100:012x}",
        dimension=384,
        build_s=4.5,
        encoder_bytes=88_000_000,
        forward_s=12.5,
    )


def _figures(names: list[str], called: Naming) -> list[Figure]:
    return [
        Figure(
            task=called(task),
            metric=metric,
            candidate=name,
            per_split=(mean,) * 5,
            mean=mean,
            low=mean - HALF,
            high=mean + HALF,
        )
        for (task, metric), means in MEANS.items()
        for name, mean in zip(names, means, strict=True)
    ]


def _differences(names: list[str], called: Naming) -> list[Difference]:
    found = []
    for (task, metric), (reference, *means) in MEANS.items():
        for name, mean in zip(names[1:], means, strict=True):
            gap = mean - reference
            verdict = "better" if gap > 0.01 else "worse" if gap < -0.01 else "within noise"
            found.append(
                Difference(
                    task=called(task), metric=metric, candidate=name, reference=names[0], mean=gap, low=gap - 0.01,
                    high=gap + 0.01, verdict=verdict,  # type: ignore[arg-type]
                )
            )  # fmt: skip
    return found


def _classes(names: list[str], called: Naming) -> list[ClassChange]:
    after = (0.9, 0.2, 0.4, 0.65, 0.5)
    return [
        ClassChange(
            task=called(task), candidate=names[1], reference=names[0], label=called(label), images=40, before=0.5, after=share
        )
        for task in TASKS
        for label, share in zip(CLASSES, after, strict=True)
    ]


def _relations(called: Naming) -> list[Relation]:
    layers = [called(f"encoder.layer.{number}.query.weight") for number in range(6)]
    found = []
    for kind, value in (("cosine", 0.12), ("sign_conflicts", 0.48), ("subspace_overlap", 0.31)):
        for place, layer in enumerate([*layers, None]):
            one = {"kind": kind, "one": called("ten"), "other": called("more"), "layer": layer}
            found.append(Relation(**one, value=value + place / 100))  # type: ignore[arg-type]
    pairs = (("base", "ten"), ("base", "more"), ("ten", "more"))
    return found + [
        Relation(kind="cka", one=called(one), other=called(other), layer=None, value=0.9 - place / 10)
        for place, (one, other) in enumerate(pairs)
    ]


def _queries(names: list[str], called: Naming) -> list[QueryChange]:
    def near(numbers: list[int]) -> tuple[Neighbour, ...]:
        return tuple(
            Neighbour(id=called(f"image-{number}"), label=called(CLASSES[number % 2]), cosine=0.9 - number / 100)
            for number in numbers
        )

    return [
        QueryChange(
            task=called(task), candidate=names[1], reference=names[0], id=called("image-0"), label=called(CLASSES[0]),
            before=near([1, 3, 5, 7]), after=near([2, 4, 1, 3]),
        )
        for task in TASKS
    ]  # fmt: skip


def _trials(called: Naming) -> list[Trial]:
    found = []
    for number in range(12):
        share, method = (number % 6) / 5, ("weighted_sum", "ties")[number // 6]
        scores = {called("category"): 0.6 + 0.1 * share, called("group"): 0.7 - 0.1 * share**2}
        found.append(
            Trial(
                number=number + 1, method=called(method), weights={called("ten"): share, called("more"): round(1 - share, 3)},
                options={called("density"): 0.2} if number > 5 else {}, scores=scores, objective=min(scores.values()),
                seconds=20.0,
            )
        )  # fmt: skip
    return found


def _thumbnail(number: int) -> str:
    return base64.b64encode(encoded(noise(64, 64, seed=number), "JPEG")).decode()
