"""Where the layers of a model go, on boxes that are made up, and with a disk on any box."""

import itertools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loaderd.server.box.dtype import DtypeChoice
from loaderd.server.errors import (
    DeviceMemoryError,
    InvalidArgumentError,
    UnsupportedOptionError,
)
from loaderd.server.models.fitting import place
from loaderd.server.models.needs import estimate
from loaderd.server.models.placement import DeviceBook, MemoryDevice
from loaderd.server.models.where import Where
from loaderd.server.store.shape import ModelShape
from loaderd.server.store.weights import Tensor
from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.build import batching_engine
from loaderd.server.worker.engine.batching.suitability import UnsuitableError
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.engine.sequential import SequentialEngine
from loaderd.server.worker.facts import model_details
from loaderd.server.worker.layers import input_device
from loaderd.server.worker.layout import Layout
from loaderd.server.worker.loader import ModelLoader
from loaderd.v1.model_pb2 import Dtype, Offload
from loaderd.v1.system_pb2 import Device, DeviceType
from tests.hub.tiny_models import build_tiny_model
from tests.unit.worker.engine_client import Client, reference

KIB = 1 << 10
GIB = 1 << 30
LAYERS = 12
Modules = dict[str, str]


def config(**changes: Any) -> Any:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return AutoConfig.for_model("llama", **sizes | changes)


def gpu(index: int, free: int = 40 * GIB) -> Device:
    return Device(
        id=f"cuda:{index}",
        type=DeviceType.DEVICE_TYPE_CUDA,
        total_bytes=80 * GIB,
        free_bytes=free,
    )


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    """A box that has two accelerators; what is read from it is this list."""
    found = [gpu(0), gpu(1)]
    monkeypatch.setattr(devices, "accelerators", lambda: found)
    monkeypatch.setattr(devices, "accelerator_kind", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(found))
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def mapped(layout: Layout, model_config: Any = None) -> dict[str, Any]:
    layout.check()
    arguments = layout.mapped(model_config or config(), torch.float16, "org/name", 1234)
    found: dict[str, Any] = arguments["device_map"]
    return found


def layers_on(found: dict[str, Any]) -> dict[Any, int]:
    """How many layers each device got."""
    of_layer = [
        next(
            place
            for name, place in found.items()
            if f"model.layers.{index}.".startswith(f"{name}.")
        )
        for index in range(LAYERS)
    ]
    return {place: of_layer.count(place) for place in dict.fromkeys(of_layer)}


def test_balanced_divides_evenly_and_sequential_fills(gpus: list[Device]) -> None:
    evenly = layers_on(mapped(Layout("balanced")))
    assert evenly.keys() == {0, 1}
    assert abs(evenly[0] - evenly[1]) <= 3
    assert mapped(Layout("sequential")) == {"": 0}
    gpus[0].free_bytes = 700 * KIB
    assert layers_on(mapped(Layout("sequential"))).keys() == {0, 1}


def test_what_is_free_counts_and_is_not_spilled_over(gpus: list[Device]) -> None:
    for each in gpus:
        each.free_bytes = 200 * KIB
    with pytest.raises(DeviceMemoryError) as caught:
        mapped(Layout("sequential"))
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (1234, 400 * KIB)
    assert "cpu" in mapped(Layout("sequential", offload="cpu")).values()
    assert (
        "disk"
        in mapped(Layout("sequential", {"cuda:0": 400 * KIB, "cpu": 200 * KIB}, "disk")).values()
    )


def test_a_device_with_offload_takes_what_it_can(gpus: list[Device]) -> None:
    gpus[1].free_bytes = 500 * KIB
    found = mapped(Layout("cuda:1", offload="cpu"))
    assert set(found.values()) == {1, "cpu"}
    assert Layout("cuda:1", offload="cpu").kind == "cuda"


def test_without_accelerators_all_strategies_mean_the_cpu(tiny: Path) -> None:
    for strategy in ("auto", "balanced", "sequential"):
        model = ModelLoader(str(tiny), device_map=strategy).load_model()
        if not torch.accelerator.is_available():
            assert model.device.type == "cpu"


MODELS = [
    {},
    {"tie_word_embeddings": False},
    {"vocab_size": 20_000},
    {"vocab_size": 20_000, "tie_word_embeddings": False},
    {"num_hidden_layers": 5, "intermediate_size": 2000},
]


def shape_of(model_config: Any) -> ModelShape:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float16)
    tensors = tuple(
        Tensor(name, tuple(weight.shape), weight.nbytes)
        for name, weight in model.named_parameters()
    )
    numbers = sum(tensor.numbers for tensor in tensors)
    return ModelShape(numbers, 2 * numbers, 0, 0, False, {}, tensors)


@pytest.mark.parametrize("changes", MODELS)
def test_accelerate_is_content_with_what_a_plan_gives_it(
    gpus: list[Device], changes: dict[str, Any]
) -> None:
    """However tight the devices are: a plan that fits is a load that fits, within the plan."""
    gpus += [gpu(2)]
    needs = estimate(shape_of(config(**changes)), 2, on_accelerator=True).needs
    main = MemoryDevice("cpu", 1 << 40, needs.headroom + needs.weights, 0.0)
    kinds = itertools.product(("auto", "balanced", "sequential"), Offload.values())
    spread: set[tuple[str, Offload.ValueType]] = set()
    for (strategy, offload), parts, slack in itertools.product(
        kinds, [(10, 40, 70), (70, 40, 10), (45, 45, 45), (5, 5, 5)], (0, 2)
    ):
        book = DeviceBook()
        rooms = [
            needs.each + slack * needs.largest + needs.divisible * part // 100 for part in parts
        ]
        gpus_of_book = (MemoryDevice(f"cuda:{i}", room, room, 0.0) for i, room in enumerate(rooms))
        book.measure([*gpus_of_book, main])
        plan = place(book, needs, Where(strategy, offload=offload))
        if not plan.weight_room:
            continue
        spread.add((strategy, offload))
        name = Offload.Name(offload).removeprefix("OFFLOAD_").lower() if offload else ""
        found = mapped(Layout("sequential", plan.weight_room, name), config(**changes))
        accelerators = {int(device[5:]) for device in plan.weight_room if device != "cpu"}
        assert set(found.values()) <= accelerators | plan.offloaded.keys()
    assert len(spread) >= 3


def everywhere(place: str, **others: str) -> Modules:
    modules = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), place)
    modules |= {f"model.layers.{index}": place for index in range(3)}
    return modules | {name.replace("_", "."): device for name, device in others.items()}


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        ({"": "cpu", "model.layer.0": "cpu"}, "no module 'model.layer.0'"),
        ({"model": "cpu"}, "no device for 'lm_head.weight'"),
        ({"": "cpu", "model.layers.1.mlp": "disk"}, "divides 'model.layers.1'"),
        ({"model": "cpu", "lm_head": "disk"}, "the same weights"),
    ],
)
def test_a_map_that_does_not_fit_the_model_is_refused(
    tiny: Path, modules: Modules, problem: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=problem):
        ModelLoader(str(tiny), device_map=modules).load_model()


@pytest.mark.parametrize("modules", [{"": "cuda:77"}, {"model": "cpu", "lm_head": "cuda:0"}])
def test_a_map_that_names_a_device_that_is_not_there_is_refused(
    tiny: Path, modules: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UnsupportedOptionError, match="this box has no device"):
        ModelLoader(str(tiny), device_map=modules).load_model()


IDS = torch.tensor([[5, 9, 77, 3, 120]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(
    ("options", "on_disk"),
    [
        ({"device_map": {"": "disk"}}, {"embed_tokens", "layers.0", "layers.1", "layers.2"}),
        ({"device_map": {"": "cpu", "model.layers": "disk"}}, {"layers.0", "layers.1", "layers.2"}),
        ({"device_map": {"": "cpu", "model.layers.1": "disk"}}, {"layers.1"}),
        (
            {"max_memory": {"cpu": 400 * KIB}, "offload": "disk"},
            {"layers.1", "layers.2"},
        ),
    ],
    ids=["all", "layers", "one layer", "what does not fit"],
)
def test_layers_on_the_disk_compute_the_same_and_are_told(
    tiny: Path, options: dict[str, Any], on_disk: set[str]
) -> None:
    plain = ModelLoader(str(tiny), dtype=torch.float32, device_map="cpu").load_model()
    model = ModelLoader(str(tiny), dtype=torch.float32, **options).load_model()
    assert torch.equal(logits(model), logits(plain))
    assert input_device(model) == torch.device("cpu")
    choice = DtypeChoice(Dtype.DTYPE_FLOAT32, "asked for")
    details, whole = (
        model_details(each, Chat(), choice, SequentialEngine, "")  # type: ignore[arg-type]
        for each in (model, plain)
    )
    if set(details.device_map) == {""}:
        assert dict(details.device_map) == {"": "disk"}
        assert details.offloaded_bytes == details.weight_bytes
    else:
        units = {"model.embed_tokens", "model.norm", "lm_head"}
        assert set(details.device_map) == units | {f"model.layers.{index}" for index in range(3)}
        disk = {name for name, place in details.device_map.items() if place == "disk"}
        assert {name for name in disk if "layers" in name or "embed" in name} == {
            f"model.{name}" for name in on_disk
        }
        assert 0 < details.offloaded_bytes < details.weight_bytes
    assert details.weight_bytes == whole.weight_bytes
    assert details.parameter_count == whole.parameter_count
    assert (dict(whole.device_map), whole.offloaded_bytes) == ({"": "cpu"}, 0)


class Chat:
    chat_template = None


def test_what_does_not_fit_is_refused_where_it_may_not_go_to_the_disk(tiny: Path) -> None:
    with pytest.raises(DeviceMemoryError) as caught:
        ModelLoader(str(tiny), dtype=torch.float32, max_memory={"cpu": 400 * KIB}).load_model()
    assert caught.value.free_bytes == 400 * KIB
    assert caught.value.needed_bytes is not None


def test_offloaded_layers_are_not_for_batches(tiny: Path) -> None:
    loader = ModelLoader(str(tiny), dtype=torch.float32, device_map={"": "disk"})
    with pytest.raises(UnsuitableError, match="offloaded"):
        batching_engine(
            loader.load_model(),
            cast(Tokenizer, None),
            "org/name",
            print,
            on_death=exit,
            context_length=64,
        )


def test_an_engine_generates_the_same_with_layers_on_the_disk(tiny: Path) -> None:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    plain = ModelLoader(str(tiny), dtype=torch.float32, device_map="cpu").load_model()
    expected = reference(plain, IDS[0].tolist(), eos_token_id=None, **options)
    modules = {"": "disk", "model.layers.1": "cpu"}
    model = ModelLoader(str(tiny), dtype=torch.float32, device_map=modules).load_model()
    client = Client(model, "sequential")
    no_more: dict[str, Any] = {}
    greedy, beams = (
        client.start(IDS[0].tolist(), return_token_ids=True, ignore_eos=True, **options, **more)
        for more in (no_more, {"num_beams": 2})
    )
    assert client.wait(greedy).token_ids == expected
    assert client.wait(beams).finished is not None
    client.engine.close()


@pytest.fixture
def pickled(tiny: Path, tmp_path: Path) -> Path:
    """A model whose weights cannot be read from the disk one by one."""
    import shutil

    from safetensors.torch import load_file

    folder = Path(shutil.copytree(tiny, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_weights_that_cannot_be_read_in_place_go_to_the_folder(
    tiny: Path, pickled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "offload"
    folder.mkdir()
    loader = ModelLoader(
        str(pickled),
        dtype=torch.float32,
        device_map={"": "cpu", "model.layers": "disk"},
        offload_folder=folder,
        allow_pickle=True,
    )
    model = loader.load_model()
    plain = ModelLoader(str(tiny), dtype=torch.float32, device_map="cpu").load_model()
    assert torch.equal(logits(model), logits(plain))
    assert {file.name.split(".")[1] for file in folder.iterdir()} == {"layers"}
