"""An evaluation as one self-contained HTML page."""

from pathlib import Path

from lora_embed.evaluate.page.neighbours import contact_sheets
from lora_embed.evaluate.page.relations import relatedness
from lora_embed.evaluate.page.scores import (
    before_and_after,
    candidate_name,
    class_changes,
    difference_of,
    figures_of,
    headline,
    heads_kept,
    metric_name,
    points,
    share,
)
from lora_embed.evaluate.page.trials import best_of, options_of, search, weights_of
from lora_embed.evaluate.records import Candidate, Evaluation
from lora_embed.report.charts import bar_chart
from lora_embed.report.page import (
    Column,
    Section,
    brief,
    code,
    escaped,
    facts,
    folded,
    moment,
    name,
    page,
    percentage,
    table,
    write,
)

FEW = 4  # encoders up to which each one's verdict is said in words


def write_report(evaluation: Evaluation, path: Path) -> None:
    """One HTML file that needs nothing else and runs no script. Raises StorageError when it cannot be written."""
    write(evaluation_page(evaluation), path)


def evaluation_page(found: Evaluation) -> str:
    """The page's HTML. All that comes from data is escaped on its way in."""
    names = ", ".join(brief(task.name, 40) for task in found.tasks) or "no task"
    lead = f'<p class="lead">{names} · {moment(found.created)}</p>'
    sections = [
        summary(found),
        before_and_after(found),
        merged(found),
        heads_kept(found),
        class_changes(found),
        search(found),
        relatedness(found),
        contact_sheets(found),
        effort(found),
        provenance(found),
    ]
    return page("Evaluation of merged encoders", lead, sections)


def summary(found: Evaluation) -> Section:
    """What a reader in a hurry needs: figures in tiles, then sentences."""
    tiles = [
        ("Encoders", f"{len(found.candidates):,}", "decoded once for all"),
        ("Tasks", f"{len(found.tasks):,}", f"{found.splits:,} splits each"),
        ("Images", f"{found.samples:,}", f"{found.decoded:,} decoded"),
        ("Rejects", f"{sum(found.rejects.values()):,}", _of(sum(found.rejects.values()), found.samples)),
    ]
    shown = "".join(f"<div><dt>{key}</dt><dd>{value}<small>{escaped(note)}</small></dd></div>" for key, value, note in tiles)
    said = [*_best_by_task(found), *_verdicts(found), *_heads(found), *_searched(found)]
    sentences = f'<ul class="says">{"".join(f"<li>{one}</li>" for one in said)}</ul>' if said else ""
    return Section(anchor="summary", title="In short", content=f'<dl class="tiles">{shown}</dl>{sentences}')


def _of(part: int, whole: int) -> str:
    return f"{percentage(part / whole, 2)} of all" if whole else "of none"


def _best_by_task(found: Evaluation) -> list[str]:
    said = []
    for task in found.tasks:
        metric = headline(found, task.name)
        figures = figures_of(found, task.name, metric)
        if not figures:
            continue
        best = max(figures.values(), key=lambda figure: figure.mean)
        gap = difference_of(found, task.name, metric, best.candidate)
        against = ", which is the reference" if best.candidate == found.reference else ""
        if gap is not None:
            against = f": {points(gap.mean)} points against {brief(gap.reference, 48)}, {escaped(gap.verdict)}"
        said.append(
            f"<b>{brief(task.name, 40)}</b>: best is {brief(best.candidate, 48)} with {share(best.mean)} % "
            f"{escaped(metric_name(metric))} (95 % interval {share(best.low)} to {share(best.high)}){against}."
        )
    return said


def _verdicts(found: Evaluation) -> list[str]:
    others = [one for one in found.candidates if one.name != found.reference]
    said = []
    for one in others if len(others) <= FEW else []:
        gaps = [difference_of(found, task.name, headline(found, task.name), one.name) for task in found.tasks]
        words = [f"{escaped(gap.verdict)} on {brief(gap.task, 40)} ({points(gap.mean)})" for gap in gaps if gap is not None]
        if words:
            said.append(f"{brief(one.name, 48)} against {brief(found.reference, 48)}: {', '.join(words)}.")
    return said


def _heads(found: Evaluation) -> list[str]:
    kept = [one for one in found.retention if one.own]
    if not kept:
        return []
    worst = min(kept, key=lambda one: one.kept / one.own)
    return [
        f"Least of a head is kept by {brief(worst.candidate, 48)} on {brief(worst.task, 40)}: "
        f"{percentage(worst.kept / worst.own)} of its own accuracy ({share(worst.own)} to {share(worst.kept)} %)."
    ]


def _searched(found: Evaluation) -> list[str]:
    best = best_of(found)
    if best is None:
        return []
    return [f"{len(found.trials):,} recipes were tried; the best is trial {best.number}, by {escaped(best.method)}."]


def merged(found: Evaluation) -> Section:
    """What each encoder is made of, and what that took."""
    columns = [
        Column(head="Encoder"),
        Column(head="Method"),
        Column(head="Weights"),
        Column(head="Dimension", is_number=True),
        Column(head="Build, s", is_number=True),
        Column(head="Size, MB", is_number=True),
        Column(head="Forward, s", is_number=True),
        Column(head="Recipe"),
        Column(head="Space"),
    ]
    rows = [_candidate(found, one) for one in found.candidates]
    same = len({one.space_id for one in found.candidates}) < len(found.candidates)
    note = "<p>Encoders of the same space are the same encoder: their figures differ by nothing.</p>" if same else ""
    content = table("What was merged; each encoder's own merge_report.json holds the proof, weight by weight", columns, rows)
    return Section(anchor="merged", title="What was merged", content=content + note if rows else "")


def _candidate(found: Evaluation, one: Candidate) -> list[str]:
    options = f"<small>{escaped(options_of(one.options))}</small>" if one.options else ""
    return [
        candidate_name(found, one.name),
        f"{name(one.method)}{options}",
        weights_of(one.weights),
        f"{one.dimension:,}",
        f"{one.build_s:,.1f}",
        f"{one.encoder_bytes / 1e6:,.1f}",
        f"{one.forward_s:,.1f}",
        code(one.recipe_id),
        code(one.space_id),
    ]


def effort(found: Evaluation) -> Section:
    """Where the time went, and what could not be embedded."""
    bars = [(stage, seconds, f"{seconds:,.1f} s") for stage, seconds in found.seconds.items()]
    charts = bar_chart("Time by stage", "Seconds by stage, summed over the workers.", bars) if bars else ""
    content = f'<div class="charts">{charts}</div>' if charts else ""
    content += rejects_table(found.rejects, found.samples)
    return Section(anchor="time", title="Time and rejects", content=content)


def rejects_table(rejects: dict[str, int], samples: int) -> str:
    """Counts by reason, the most first."""
    if not rejects:
        return "<p>No image was rejected.</p>"
    rows = [
        [name(reason), f"{count:,}", _of(count, samples)]
        for reason, count in sorted(rejects.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    columns = [Column(head="Reason"), Column(head="Images", is_number=True), Column(head="Share", is_number=True)]
    return table("Images that could not be embedded", columns, rows)


def provenance(found: Evaluation) -> Section:
    """Enough to do it again."""
    pairs = [
        ("Inputs", "<br>".join(name(one, 120) for one in found.inputs) or "none"),
        ("Evaluated", moment(found.created)),
        ("Images", f"{found.samples:,}, of which {found.decoded:,} were decoded, each once for all encoders"),
        ("Splits", f"{found.splits:,} of seed {found.seed}; {percentage(found.bank_share, 1)} of the images in the bank"),
        ("Reference", name(found.reference)),
        ("Format", f"{found.format}"),
    ]
    listed = "".join(
        folded(
            f"{len(task.classes):,} classes of {brief(task.name, 40)}",
            f"<p>{', '.join(brief(c, 60) for c in task.classes)}</p>",
        )
        for task in found.tasks
    )
    return Section(anchor="lineage", title="Provenance", content=facts(pairs) + listed)
