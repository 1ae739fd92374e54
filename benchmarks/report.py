"""The measurements as Markdown tables, for a person."""

from typing import Any

from compare import BreakEven

RATES = [
    "contestant",
    "whole run s",
    "start-up s",
    "steady images/s",
    "of the limit",
    "end s",
    "CPU s",
    "peak memory MB",
    "vectors",
]


def describe(found: dict[str, Any]) -> str:
    """All of it."""
    machine, start = found["machine"], found["start"]
    lines = [
        f"{machine['cores']} cores, {machine['cpu']}, native bfloat16: {'yes' if machine['native_bfloat16'] else 'no'}, "
        f"load average at the start {machine['load_average']:.1f}; medians of {found['repeats']} (least–largest)",
        f"An empty Ray job: {start['empty_ray_job_s']:.1f} s (import {start['import_ray_s']:.1f}, init {start['init_s']:.1f}, "
        f"first row {start['first_row_s']:.1f}, shutdown {start['shutdown_s']:.1f}); importing torch and transformers: "
        f"{start['import_torch_transformers_s']:.1f} s",
    ]
    for name, workload in found["workloads"].items():
        lines += ["", f"### {name}: {workload['about']}", *describe_workload(workload)]
    return "\n".join(lines)


def describe_workload(workload: dict[str, Any]) -> list[str]:
    size = (
        f"{workload['images']:,} images in {workload['shards']:,} tars, {workload['bytes'] / 1e6:,.0f} MB, {workload['model']}"
    )
    if "resume" in workload:
        return [size, *describe_resume(workload["resume"])]
    limits, storage = workload["limits_images_per_s"], workload["storage"]
    allowed = {key: f"{min(of[key] for of in limits):.1f}–{max(of[key] for of in limits):.1f}" for key in limits[0]}
    return [
        size,
        f"All cores together: decoding alone {allowed['decode']} images/s, the model alone {allowed['forward']}, one after the "
        f"other {allowed['both']} (the limit). Storage: {storage['read_mb_per_s']:.0f} MB/s read, "
        f"{storage['write_mb_per_s']:.0f} MB/s written, {storage['commits_per_s']:.0f} commits/s",
        "",
        *table([RATES, *(row_of(name, of) for name, of in workload["contestants"].items())]),
        "",
        f"- {describe_forecast(workload)}",
        *(f"- {line}" for name, of in workload["contestants"].items() if (line := break_even_of(name, of))),
    ]


def row_of(name: str, of: dict[str, Any]) -> list[str]:
    if "failed" in of:
        return [name, f"failed: {of['failed'].splitlines()[0][:120]}", *[""] * (len(RATES) - 2)]
    median, spread = of["median"], of["spread"]
    return [
        name,
        ranged(median["whole_s"], spread["whole_s"]),
        ranged(median["startup_s"], spread["startup_s"]),
        ranged(median["steady_images_per_s"], spread["steady_images_per_s"]),
        f"{of['steady_over_limit']:.2f}",
        f"{median['end_s']:.1f}",
        f"{median['cpu_s']:.0f}",
        f"{median['peak_pss_bytes'] / 1e6:,.0f}",
        deviation_text(of.get("deviation")),
    ]


def ranged(median: float, spread: list[float]) -> str:
    return f"{median:.1f}" if spread[0] == spread[1] else f"{median:.1f} ({spread[0]:.1f}–{spread[1]:.1f})"


def deviation_text(deviation: dict[str, Any] | None) -> str:
    """The largest relative difference of a vector, and what is missing."""
    if deviation is None:
        return ""
    rows = [f"{deviation[key]} {key}" for key in ("missing", "unexpected") if deviation[key]]
    return ", ".join([*rows, f"{'the same' if deviation['is_same'] else 'others'}: {deviation['largest']:.0e}"])


def break_even_of(name: str, of: dict[str, Any]) -> str:
    return f"whole run against {name}: {BreakEven(**of['break_even']).describe()}" if "break_even" in of else ""


def describe_forecast(workload: dict[str, Any]) -> str:
    """What was said before the first run beside what it took."""
    said, ours = workload["forecast_s"], workload["contestants"]["lora-embed"]
    took = f"; a run took {ours['median']['whole_s']:.0f} s" if "median" in ours else ""
    return f"`plan --forecast`: {said:.0f} s{took}"


def describe_resume(resume: dict[str, Any]) -> list[str]:
    """Cost and bytes of finishing a job, beside those of all of it."""
    rows = [["", "seconds", "CPU s", "MB read"]]
    for name, run in (("whole job", resume["whole"]), *(("what was left", run) for run in resume["rest"])):
        rows.append([name, f"{run['whole_s']:.1f}", f"{run['cpu_s']:.0f}", f"{run['bytes_read'] / 1e6:.1f}"])
    return [
        f"{resume['parts'] - 1} of {resume['parts']} chunks were done; tars of {resume['input_bytes'] / 1e6:.1f} MB",
        "",
        *table(rows),
    ]


def table(rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
