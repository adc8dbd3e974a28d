"""`build_engine` with NVIDIA's real TensorRT-RTX, which compiles ahead of time on a host without a card."""

from __future__ import annotations

import json
import time
from pathlib import Path

import onnx
import pytest
from official import SMALL, SMALL_NAME, official_content
from tiny_onnx import write_tiny_onnx

from vimdeploy import bundle
from vimdeploy.engines.build import BuildOptions, Progress, build_engine
from vimdeploy.engines.capabilities import RTX, import_runtime
from vimdeploy.engines.sidecar import check_plan, read_sidecar, sidecar_path
from vimdeploy.errors import EngineError, ModelFileError, RuntimeMissing, UsageError, VimDeployError
from vimdeploy.export.exporter import ExportOptions, export_checkpoint
from vimdeploy.models.variants import VimConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


@pytest.fixture(scope="module", autouse=True)
def rtx() -> None:
    try:
        import_runtime(RTX)
    except RuntimeMissing as missing:
        pytest.skip(missing.message)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Vim's folder; copied before it is written to."""
    import torch

    folder = tmp_path_factory.mktemp("rtx")
    torch.save(official_content(SMALL, SMALL_NAME, ema=False, optimizer=False), folder / "small.pth")
    return export_checkpoint(folder / "small.pth", folder / "small.vim", ExportOptions()).model


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "small.vim"
    folder.mkdir()
    for name in (bundle.MODEL_FILE, bundle.MANIFEST):
        (folder / name).write_bytes((exported.parent / name).read_bytes())
    return folder / bundle.MODEL_FILE


class Told(Progress):
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.phases: dict[str, int] = {}
        self.open: set[str] = set()

    def step(self, text: str) -> None:
        self.steps.append(text)

    def phase(self, name: str, parent: str | None, steps: int) -> None:
        self.phases[name] = 0
        self.open.add(name)

    def advance(self, name: str, done: int) -> bool:
        self.phases[name] += 1
        return True

    def finish(self, name: str) -> None:
        self.open.discard(name)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_body_builds_and_has_the_precision_asked_for(model: Path, precision: str) -> None:
    told = Told()
    result = build_engine(model, None, BuildOptions(runtime=RTX, precision=precision, max_batch=16), progress=told)
    assert result.plan == model.with_name(f"model.{precision}.plan") and result.plan.stat().st_size == result.plan_bytes
    found = result.sidecar.precision
    # in_proj, x_proj, dt_proj twice, out_proj; two layers; patches and head. The loop's own product stays fp32.
    assert found["projections"] == {precision: 2 * 6 + 2} and found["hidden"] == 0
    assert found["islands"] == {"fp32": 3}
    assert found["source"] == "network"  # an engine for RTX cards cannot be opened here
    assert told.phases["Building engine"] > 0 and not told.open
    assert told.steps[0] == "typing the graph"


@pytest.mark.parametrize("fusion", ["none", "bidirectional"])
def test_a_file_is_fused_no_further_where_no_plugin_is_taken(exported: Path, tmp_path: Path, fusion: str) -> None:
    """The ops are built in as bodies, so fusing gains nothing; every other test here has a fully fused file."""
    checkpoint = exported.parent.parent / "small.pth"
    model = export_checkpoint(checkpoint, tmp_path / f"{fusion}.vim", ExportOptions(fusion=fusion)).model
    sidecar = build_engine(model, None, BuildOptions(runtime=RTX, precision="fp16")).sidecar
    assert sidecar.build["fusion"] == fusion == sidecar.info.fusion
    assert sidecar.precision["projections"] == {"fp16": 14} and sidecar.precision["islands"] == {"fp32": 3}


def test_what_is_written_says_everything(model: Path) -> None:
    result = build_engine(
        model, None, BuildOptions(runtime=RTX, precision="fp16", min_batch=2, opt_batch=4, max_batch=8)
    )
    sidecar = read_sidecar(result.plan)
    check_plan(result.plan, sidecar)
    assert sidecar == result.sidecar
    assert sidecar.info == bundle.read_info(model)
    assert str(sidecar.profile) == "images 2..4..8 x 3 x 32 x 32"
    assert sidecar.device is None and sidecar.plugin is None and not sidecar.tf32
    assert sidecar.onnx == {"file": "model.onnx", "sha256": bundle.sha256_of(model)}
    assert sidecar.build["timing_cache"] is None and sidecar.build["fusion"] == "full" == sidecar.info.fusion
    manifest = bundle.read_manifest(model)["files"]
    assert set(manifest) == {"model.onnx", "model.fp16.plan", "model.fp16.plan.json"}
    assert manifest["model.fp16.plan"]["sha256"] == sidecar.plan["sha256"] == bundle.sha256_of(result.plan)
    bundle.check_hash(result.plan)
    assert not [p for p in model.parent.iterdir() if p.name.startswith(".")]


def test_it_is_the_same_graph_that_was_exported(model: Path) -> None:
    before = model.read_bytes()
    build_engine(model, model.parent / "x.plan", BuildOptions(runtime=RTX))
    assert model.read_bytes() == before


@pytest.mark.parametrize("option", ["timing_cache", "plugin", "version_compatible"])
def test_what_rtx_cannot_do_is_said_before_any_work(model: Path, option: str) -> None:
    value: object = True if option == "version_compatible" else model
    with pytest.raises(UsageError, match="TensorRT-RTX") as caught:
        build_engine(model, None, BuildOptions(runtime=RTX, **{option: value}))  # type: ignore[arg-type]
    assert caught.value.hint == f"leave out --{option.replace('_', '-')}"


def refused(error: type[VimDeployError], model: Path, out: Path | None = None, **options: object) -> str:
    before = set(model.parent.iterdir())
    with pytest.raises(error) as caught:
        build_engine(model, out, BuildOptions(runtime=RTX, **options))  # type: ignore[arg-type]
    assert caught.value.hint and set(model.parent.iterdir()) == before
    return caught.value.message


def test_bad_input(model: Path, tmp_path: Path) -> None:
    assert "batches must grow" in refused(UsageError, model, min_batch=8, max_batch=4)
    assert "does not end in .plan" in refused(UsageError, model, tmp_path / "x.engine")
    assert "does not exist" in refused(UsageError, model, tmp_path / "none" / "x.plan")
    assert "'int4' is unknown" in refused(UsageError, model, precision="int4")
    assert "'some' is unknown" in refused(UsageError, model, fusion="some")
    assert "is fused (full) already and cannot be built with --fusion none" in refused(UsageError, model, fusion="none")
    assert "has no vim:: operator" in refused(ModelFileError, write_tiny_onnx(tmp_path / "no" / "model.onnx", op=False))
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    assert "SHA-256 differs" in refused(ModelFileError, model)


def test_a_typed_file_keeps_its_types(exported: Path, tmp_path: Path) -> None:
    typed = export_checkpoint(
        exported.parent.parent / "small.pth", tmp_path / "typed.vim", ExportOptions(precision="fp16")
    )
    assert build_engine(typed.model, None, BuildOptions(runtime=RTX)).sidecar.precision["asked"] == "fp16"
    assert "is fp16 already and cannot be built as bf16" in refused(UsageError, typed.model, precision="bf16")


def test_a_graph_its_parser_does_not_know_is_refused_with_the_node(model: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(model))
    proto.graph.node[0].op_type = "Einsteinium"
    proto.graph.node[0].name = "the strange one"
    strange = tmp_path / "strange.onnx"
    onnx.save(proto, str(strange))
    assert "the strange one" in refused(EngineError, strange)


def test_the_shipped_model(tmp_path: Path) -> None:
    checkpoint = ROOT / "examples" / "digits" / "vim_digits.pth"
    if not checkpoint.is_file():
        pytest.skip("examples/digits/vim_digits.pth is not in this checkout")
    model = export_checkpoint(checkpoint, tmp_path / "digits.vim", ExportOptions()).model
    found = build_engine(model, None, BuildOptions(runtime=RTX, precision="fp16")).sidecar.precision
    assert found["projections"] == {"fp16": 8 * 6 + 2} and found["islands"] == {"fp32": 9}


def test_vim_tiny(tmp_path: Path) -> None:
    import torch

    content = official_content(VimConfig(d_model=192), TINY, ema=False, optimizer=False)
    torch.save(content, tmp_path / "tiny.pth")
    model = export_checkpoint(tmp_path / "tiny.pth", tmp_path / "tiny.vim", ExportOptions()).model
    began = time.perf_counter()
    result = build_engine(model, None, BuildOptions(runtime=RTX, precision="fp16"))
    assert result.sidecar.precision["projections"] == {"fp16": 24 * 6 + 2}
    json.loads(sidecar_path(result.plan).read_text())
    print(f"Vim-Ti: {time.perf_counter() - began:.1f} s, {result.plan_bytes / 1e6:.1f} MB")
