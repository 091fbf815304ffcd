"""`SSSDPipeline`: schedulers of diffusers, folders that load to the same bits, and a hub; no network."""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from huggingface_hub import constants, hf_api
from torch import Tensor

from barcast.models import ConfigError
from barcast.models.sssd import NOISE_SCHEDULE, SSSDModel, SSSDPipeline
from tests.models import seeds

NAMES = {
    "DDPMScheduler": {"clip_sample": False},
    "DDIMScheduler": {"clip_sample": False},
    "PNDMScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
}
"""The schedulers that the document lists, and what else they must be made with."""

STOCHASTIC = {"DDPMScheduler", "EulerAncestralDiscreteScheduler"}


def _pipeline(model: SSSDModel | None = None, scheduler: Any = None) -> SSSDPipeline:
    scheduler = DPMSolverMultistepScheduler(**NOISE_SCHEDULE) if scheduler is None else scheduler
    return SSSDPipeline(seeds.model() if model is None else model, scheduler)


def _samples(pipeline: SSSDPipeline, **how: Any) -> Tensor:
    found = pipeline(seeds.features(3), horizons=[5, 15, 60], num_samples=40, **how)
    return torch.stack([one["samples"] for one in found.values()])


def test_it_forecasts_what_the_model_does() -> None:
    """With DPM-Solver++ on the product's grid every sample has the bits of the product's own sampler."""
    model, x = seeds.model(), seeds.features(3)
    found = _pipeline(model)(features=x, horizons=[60, 5], num_inference_steps=12, num_samples=30)
    own = model.inference_forward(x, [2, 0], 30, "dpmpp", 12)
    assert list(found) == [60, 5]
    for minutes, h in ((60, 2), (5, 0)):
        assert all(torch.equal(value, own[h][key]) for key, value in found[minutes].items())  # type: ignore[literal-required]


def test_horizons_are_minutes() -> None:
    """They come back in the order asked for; one that the model has not is refused."""
    pipeline, x = _pipeline(), seeds.features(1)
    assert list(pipeline(x, [15], num_samples=2)) == [15]
    with pytest.raises(ConfigError, match="a horizon of 240 minutes is unknown: choose from 5, 15, 60"):
        pipeline(x, [15, 240])


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of scipy, within LMS
@pytest.mark.parametrize("name", NAMES)
def test_the_listed_schedulers_serve(name: str) -> None:
    """Each comes near a fine solution with many steps, and a second call gives what the first one gave."""
    model = seeds.model()
    pipeline = _pipeline(model, getattr(diffusers, name)(**NOISE_SCHEDULE, **NAMES[name]))
    found = _samples(pipeline, num_inference_steps=100)
    assert torch.equal(_samples(pipeline, num_inference_steps=100), found)
    exact = _samples(_pipeline(model), num_inference_steps=200)
    spread = exact.std(1, keepdim=True)
    if name in STOCHASTIC:  # the same law by other draws
        assert ((found.mean(1) - exact.mean(1)).abs() < 0.6 * spread[:, 0]).all()
        assert found.std() == pytest.approx(float(exact.std()), rel=0.25)
        drawn = [_samples(pipeline, generator=seeds.generator(k)) for k in (1, 1, 2)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
    else:
        assert ((found - exact) / spread).square().mean().sqrt() < 0.15


LINEAR = np.linspace(1e-4, 0.02, 1000)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (EulerDiscreteScheduler, {"beta_schedule": "scaled_linear"}, "beta_schedule = 'scaled_linear'"),
        (EulerDiscreteScheduler, {"prediction_type": "epsilon"}, "prediction_type = 'epsilon'"),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}, "use_karras_sigmas = True"),
        (DDIMScheduler, {}, "DDIMScheduler has clip_sample = True"),
        (DDIMScheduler, {"num_train_timesteps": 500, "clip_sample": False}, "num_train_timesteps = 500"),
        (UniPCMultistepScheduler, {"use_flow_sigmas": True}, "use_flow_sigmas = True"),
        (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}, "use_lu_lambdas = True"),
        (DPMSolverMultistepScheduler, {"trained_betas": LINEAR}, "noise levels of its own"),
        (DDIMScheduler, {"trained_betas": LINEAR, "clip_sample": False}, "noise levels of its own"),
    ],
)
def test_another_noise_schedule_than_that_of_the_training_is_refused(
    kind: Any, options: dict[str, Any], words: str
) -> None:
    """A schedule, a prediction type or a clip that would make other forecasts is refused with the remedy."""
    with pytest.raises(ConfigError) as fault:
        _pipeline(scheduler=kind(**NOISE_SCHEDULE | options))
    assert words in str(fault.value)
    assert ": make it with " in str(fault.value)


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("_offline")
def test_a_folder_loads_to_the_same_bits(tmp_path: Path) -> None:
    """Saved and loaded without a network, weights, settings, scheduler and samples are the same."""
    model = seeds.model()
    pipeline = _pipeline(model, EulerDiscreteScheduler(**NOISE_SCHEDULE))
    pipeline.save_pretrained(tmp_path / "it")
    files = {str(path.relative_to(tmp_path / "it")) for path in (tmp_path / "it").rglob("*.*")}
    weights = "model/diffusion_pytorch_model.safetensors"
    assert files == {"model_index.json", "model/config.json", weights, "scheduler/scheduler_config.json"}
    loaded = SSSDPipeline.from_pretrained(tmp_path / "it")
    assert isinstance(loaded.scheduler, EulerDiscreteScheduler)
    assert loaded.model.model.config == model.config
    assert not loaded.model.training
    assert torch.equal(_samples(loaded), _samples(pipeline))


class _Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload asks for; `files` is what was committed to it."""

    files: dict[str, bytes]
    asked: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(self.path)
        assert self.headers["Authorization"] == "Bearer hf_stub"
        if self.path.endswith("/repos/create"):
            self._say({"url": f"http://{self.headers['Host']}/desk/it", "id": "desk/it"})
        elif "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self._say({"files": [{"path": file["path"], **how} for file in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = f"http://{self.headers['Host']}/desk/it/commit/{'0' * 40}"
            self._say({"commitUrl": commit, "commitOid": "0" * 40, "success": True})
        else:
            self._say({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass

    def _say(self, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    _Hub.files, _Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    files = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    yield _Hub
    server.shutdown()
    server.server_close()


def test_it_is_shared_by_a_hub(hub: type[_Hub], tmp_path: Path) -> None:
    """What `push_to_hub` uploads is the folder of which the same pipeline is made again."""
    pipeline = _pipeline()
    pipeline.push_to_hub("desk/it", token="hf_stub")
    assert "/api/repos/create" in hub.asked
    assert set(hub.files) >= {"model_index.json", "model/config.json", "scheduler/scheduler_config.json"}
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert torch.equal(_samples(SSSDPipeline.from_pretrained(tmp_path)), _samples(pipeline))
