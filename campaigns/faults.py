"""The faults of the fault campaign: their kinds, when they happen to a run, and what they do."""

import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from s3 import Faults, Refusal, Request

# When a fault strikes: at the how manieth request of a kind.
PHASES: dict[str, Callable[[Request], bool]] = {
    "start": lambda r: True,
    "listing": lambda r: r.method == "GET" and "list-type=2" in r.query,
    "recipe": lambda r: r.method == "GET" and "/recipes/" in r.path,  # read and hashed; nothing is built of it yet
    "encoder": lambda r: r.method == "PUT" and "/encoders/" in r.path,
    "decode": lambda r: r.method == "GET" and r.path.endswith(".tar"),
    "commit": lambda r: r.method == "PUT" and "/staging/" in r.path,
    "publish": lambda r: (
        (r.method == "PUT" and ("/data/" in r.path or "/versions/" in r.path or r.path.endswith("CURRENT")))
        or (r.method == "POST" and "delete" in r.query)
    ),
}
# Of such requests in a run of the campaign's job, or a safe bound below it.
MOST = {"start": 1, "listing": 3, "recipe": 1, "encoder": 3, "decode": 5, "commit": 9, "publish": 3}

# Whose process is killed → its title under Ray; the driver and all at once have none.
TARGETS = {"actor": "ray::MapWorker(MapBatches(Embed", "decoder": "ray::MapBatches(decode_blocks)", "writer": "WriteParts"}
STORE_FULL = {
    "507 of MinIO": Refusal(507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold."),
    "403 of Ceph": Refusal(403, "QuotaExceeded", "The quota of this bucket is exceeded."),
}
EXPIRED = {
    "session ended": Refusal(400, "ExpiredToken", "The provided token has expired."),
    "key removed": Refusal(403, "InvalidAccessKeyId", "The access key Id you provided does not exist in our records."),
    "right withdrawn": Refusal(403, "AccessDenied", "Access Denied."),
}
TRANSIENT = {  # network kind → its fault in the proxy, and the shares of requests among which one is drawn
    "503 SlowDown": ("error", (0.1, 0.3)),
    "connections reset": ("reset", (0.05, 0.2)),
    "bodies cut short": ("cut", (0.05, 0.2)),
    "reads stalled": ("stall", (0.02, 0.08)),
    "answers of PUTs lost": ("lost_answer", (0.2, 0.6)),
}
MONITOR = "Ray's monitor"  # ends workers from their start on
APART, TOGETHER = ("decoder killed", "writer killed"), ("node lost",)  # the chain's stages, by kind of fault
NETWORK = "no usable answer|cannot be reached"
FULL = "No space left on device|[Dd]isk is full"
WORKERS = "died|killed|lost|crashed|unexpectedly"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of fault: its forms, where it may strike, and how an error is to name it (a regular expression)."""

    name: str
    phases: tuple[str, ...]
    cause: str
    forms: tuple[str, ...] = ("",)
    pairs: bool = True  # may go with a transient fault of the network


KINDS = (
    *(Kind(name=name, phases=("start",), cause=NETWORK, pairs=False) for name in TRANSIENT),
    Kind(name="store gone for good", phases=("encoder", "decode", "commit", "publish"), cause=NETWORK,
         forms=("error", "reset", "stall")),
    Kind(name="store gone for a while", phases=("encoder", "decode", "commit", "publish"), cause=NETWORK,
         forms=("error", "reset", "stall")),
    Kind(name="actor killed", phases=("decode", "commit"), cause=WORKERS),
    Kind(name="decoder killed", phases=("decode",), cause=WORKERS),
    Kind(name="writer killed", phases=("commit",), cause=WORKERS),
    Kind(name="driver killed", phases=("listing", "encoder", "decode", "commit", "publish"), cause="", forms=("SIGKILL",)),
    Kind(name="driver told to end", phases=("listing", "decode", "commit"), cause="stopped by a signal|interrupted",
         forms=("SIGTERM", "SIGINT")),
    Kind(name="all processes killed", phases=("listing", "encoder", "decode", "commit", "publish"), cause=""),
    Kind(name="node lost", phases=("decode", "commit"), cause=WORKERS,
         forms=("one of two", "one of two, another comes", "both, another comes"), pairs=False),
    Kind(name="store full", phases=("encoder", "commit", "publish"), cause="full|free drive threshold|[Qq]uota",
         forms=tuple(STORE_FULL)),
    Kind(name="scratch disk full", phases=("recipe",), cause=FULL),
    Kind(name="cache disk full", phases=("listing",), cause=FULL),
    Kind(name="Ray's disk full", phases=("decode", "commit"), cause=FULL),
    Kind(name="table's disk full", phases=("decode",), cause=FULL),
    Kind(name="out of memory", phases=("decode", "commit"), cause="memory|failed to map segment",
         forms=("address space", MONITOR)),
    Kind(name="driver cut off", phases=("decode", "commit", "publish"), cause=NETWORK,
         forms=("storage silent for 60 s", "stopped for 20 s"), pairs=False),
    Kind(name="keys expired", phases=("encoder", "decode", "commit", "publish"), cause="access denied|refused|expired",
         forms=tuple(EXPIRED)),
    Kind(name="shard replaced", phases=("listing", "decode", "commit", "publish"), cause="changed since it was listed"),
    Kind(name="recipe changed", phases=("recipe", "encoder", "commit"), cause="changed while",
         forms=("base", "adapter"), pairs=False),
    Kind(name="started twice", phases=("commit",), cause=WORKERS, forms=("both live", "one killed")),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One drawn for a run: struck before the server sees the request, or when it is done and not yet acknowledged."""

    kind: Kind
    form: str
    phase: str
    number: int
    is_done: bool
    gpus: int  # declared: decoding, embedding and writing in processes of their own
    beside: str = ""  # a transient fault that goes on all the time
    seed: int = 0

    def __str__(self) -> str:
        parts = (self.kind.name, self.form, f"{self.phase} {self.number}{' done' if self.is_done else ''}")
        ends = ("apart" if self.gpus else "", f"with {self.beside}" if self.beside else "")
        return ", ".join(part for part in (*parts, *ends) if part)


def draw(seed: int, number: int) -> Fault:
    """The fault of a run: kinds and their forms in turn, the rest by chance."""
    rng = random.Random(f"{seed} {number}")
    kind = KINDS[number % len(KINDS)]
    form = kind.forms[(number // len(KINDS) + seed) % len(kind.forms)]
    phase = "start" if form == MONITOR else rng.choice(kind.phases)
    together, apart = kind.name in TOGETHER, kind.name in APART
    return Fault(
        kind=kind,
        form=form,
        phase=phase,
        number=rng.randint(1, MOST[phase]),
        is_done=rng.random() < 0.5,
        gpus=1 if apart else 0 if together else rng.randint(0, 1),
        beside=rng.choice(list(TRANSIENT)) if kind.pairs and rng.random() < 0.3 else "",
        seed=rng.randrange(2**16),
    )


@dataclass
class Trap:
    """Strikes once when the moment has come; again at the next request where there was nothing to strike at."""

    fault: Fault
    strike: Callable[[], str]
    seen: int = 0
    struck: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: Request) -> None:
        if not PHASES[self.fault.phase](request):
            return
        with self.lock:
            self.seen += 1
            if self.seen >= self.fault.number and not self.struck:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.struck = self.strike()


def transient(name: str, seed: int) -> Faults:
    """A share of the requests fails; what the share is, the seed says."""
    fault, (least, most) = TRANSIENT[name]
    only = (lambda request: request.method == "PUT") if fault == "lost_answer" else None
    return Faults(seed, only=only, stall_s=30, **{fault: random.Random(seed).uniform(least, most)})
