"""Fixtures every room shares: one Ray for the whole session, and an offline, quiet environment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports these libraries: no hub, no telemetry, no thread oversubscription, and a
# private numba cache so that a read-only checkout works too.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "MODELYARD_ROOT"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def _ray_at_end() -> Iterator[None]:
    yield
    from modelyard.stages import session

    session.stop()


@pytest.fixture
def ray_session(_ray_at_end: None) -> None:
    """A local Ray with two CPUs, shared by all tests that ask for it and started again if one ended it."""
    from modelyard.stages import session

    session.start(2)


@pytest.fixture
def no_ray() -> Iterator[None]:
    """For tests that start a Ray of their own: ends the shared one before, and theirs after."""
    from modelyard.stages import session

    session.stop()
    yield
    session.stop()


@pytest.fixture
def moto_server(_moto: str) -> str:
    """A real S3 endpoint (moto in server mode) with the bucket `yard`; sets the AWS environment.

    The bucket is made again for every test: a test that mocks AWS in this process empties the server.
    """
    import boto3

    boto3.client("s3").create_bucket(Bucket="yard")
    return _moto


@pytest.fixture(scope="session")
def _moto() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    from modelyard.stages import session

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    values = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    # Workers inherit the environment their Ray was started with: one that runs already knows no key of this server.
    session.stop()
    yield endpoint
    server.stop()
    for key, value in before.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


@pytest.fixture(scope="session")
def documentation() -> Path:
    """The site-packages folder: real prose and code that every machine with the tests has."""
    import sysconfig

    return Path(sysconfig.get_paths()["purelib"])


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A session-wide temporary folder."""
    with tempfile.TemporaryDirectory(prefix="modelyard-tests-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def embedding_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of one layer with random weights and a word tokenizer: equal words in other order are near."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("embedding"))
    words = ["[PAD]", "[UNK]", *(f"w{n}" for n in range(100))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=102, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, type_vocab_size=1, initializer_range=1.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder
