"""What tests share: real weights and adapters, tiny random models, and one Ray cluster for all that need it."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("LORA_EMBED_CACHE", str(Path(__file__).resolve().parents[1] / ".cache"))

import hypothesis
import torch

from lora_embed import demo
from lora_embed.chain import cluster as ray_cluster
from lora_embed.demo import parts
from lora_embed.model.base_files import Base, find_base
from lora_embed.model.match import target_of
from lora_embed.model.whole import Target
from lora_embed.monitor.progress import say
from lora_embed.store.fetch import cache_root
from lora_embed.store.retry import take_retries
from s3 import S3Server, s3_server

hypothesis.settings.register_profile("no deadline", deadline=None)  # an example may take long on a busy machine
hypothesis.settings.load_profile("no deadline")
torch.set_num_threads(1)  # two threads on contended cores fall to a quarter

ADAPTERS = Path(demo.__file__).parent / "adapters"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests use Ray go first, so that no worker is left with one of them while the other has nothing to do."""
    slow = {item.path for item in items if "cluster" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Leave what libraries and collected tests hold out of garbage collection: to look at it again and again takes a tenth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_runtest_setup() -> None:
    """Forget the repeated requests of earlier tests of this process: the next chunk that is decoded would count them."""
    take_retries()


@pytest.fixture(scope="session")
def demo_cache() -> Path:
    """Where real weights and images are kept between runs."""
    return cache_root()


@pytest.fixture(scope="session")
def base_model(demo_cache: Path) -> Path:
    """A real pretrained ViT-S/14."""
    return parts.fetch_base_model(demo_cache, say)


@pytest.fixture(scope="session")
def base(base_model: Path) -> Base:
    """The same, found and hashed."""
    return find_base(str(base_model), None)


@pytest.fixture(scope="session")
def target(base: Base) -> Target:
    """Its architecture, for adapters to be matched to."""
    return target_of(base)


@pytest.fixture(scope="session")
def real_adapters() -> dict[str, Path]:
    """Two real adapters for it, of 10 and of 27 classes."""
    return {name: ADAPTERS / name for name in ("category10", "group27")}


@pytest.fixture(scope="session")
def real_images(demo_cache: Path) -> list[parts.LabelledImage]:
    """Real labelled images, 64×64."""
    return parts.fetch_images(demo_cache, say)


@pytest.fixture
def cluster() -> None:
    """A Ray cluster of this machine's CPUs, in this process: started where there is none, ended with the process."""
    ray_cluster.connect()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with a bucket `images`."""
    with s3_server(tmp_path_factory.mktemp("server")) as server:
        server.make_bucket("images")
        yield server
