"""What the text of a compiled program says and, where their compilers are installed, programs for TPUs and GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import aot, program_text
from empssl_jax.config import ModelConfig
from empssl_jax.config.errors import UserError
from empssl_jax.method.encoder import init_encoder

REPOSITORY = Path(__file__).parent.parent

# Layouts, names and comments inside tuples follow the output of libtpu.
HLO = """
HloModule jit_step, is_scheduled=true

%region_1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

ENTRY %main (p: f32[2,8]) -> f32[16] {
  %psum.1 = f32[2,8]{1,0:T(2,128)S(1)} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%region_1
  %all-reduce.2 = (bf16[3,3,8]{2,1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[5]{0:T(512)(4,1)}, s32[]) all-reduce(%q, %r)
  %get-tuple-element.1 = bf16[3,3,8]{2,1,0} get-tuple-element(%all-reduce.2), index=0
  %all-reduce-start.3 = f32[100]{0} all-reduce-start(%t), to_apply=%region_1
  %all-reduce-done.3 = f32[100]{0} all-reduce-done(%all-reduce-start.3)
  %all-gather-start.4 = (f32[4,10]{1,0}, f32[8,10]{1,0:T(8,128)S(1)}) all-gather-start(%u), dimensions={0}
  %all-gather-done.4 = f32[8,10]{1,0:T(8,128)S(1)} all-gather-done(%all-gather-start.4)
  %permute-start = (s32[6]{0}, s32[6]{0}, u32[], u32[]) collective-permute-start(%v), source_target_pairs={{0,1},{1,0}}
  %permute-done = s32[6]{0} collective-permute-done(%permute-start)
  %fusion.5 = f32[9]{0} fusion(%all-gather-done.4), metadata={op_name="jit(step)/all-gather(x)"}
  %all-to-all.6 = (f8e4m3fn[7]{0}, u4[3]{0}) all-to-all(%w, %x)
  ROOT %scatter.7 = f64[16]{0} reduce-scatter(%y), dimensions={0}, to_apply=%region_1
}
"""


def test_collectives_are_counted_once_with_the_bytes_of_their_results():
    all_reduces = [2 * 8 * 4, 3 * 3 * 8 * 2 + 5 * 1 + 4, 100 * 4]
    assert program_text.collectives(HLO) == {
        "all-reduce": {"count": 3, "bytes": sum(all_reduces), "largest": (400, "f32[100]")},
        "all-gather": {"count": 1, "bytes": 320, "largest": (320, "f32[8,10]")},
        "collective-permute": {"count": 1, "bytes": 24, "largest": (24, "s32[6]")},
        "all-to-all": {"count": 1, "bytes": 7 + 2, "largest": (7, "f8e4m3fn[7]")},
        "reduce-scatter": {"count": 1, "bytes": 128, "largest": (128, "f64[16]")},
    }


# Of a GPU, shortened: two convolutions, one of them in a loop of three rounds, a matrix product, and a sum of 4 x 8.
GPU_HLO = """
HloModule jit_step, is_scheduled=true

%fused_add (p.1: f32[4,8]) -> f32[4,8] {
  ROOT %add.1 = f32[4,8]{1,0} add(%p.1, %p.1)
}

%body (q: (s32[], bf16[2,8,8,3])) -> (s32[], bf16[2,8,8,3]) {
  %q = (s32[], bf16[2,8,8,3]{3,2,1,0}) parameter(0)
  %get-tuple-element.1 = bf16[2,8,8,3]{3,2,1,0} get-tuple-element(%q), index=1
  %conv.1 = (bf16[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%get-tuple-element.1), target="__cudnn$convForward"
  ROOT %tuple.1 = (s32[], bf16[2,8,8,3]{3,2,1,0}) tuple(%q, %conv.1)
}

ENTRY %main (x: bf16[2,8,8,3], y: f32[4,8]) -> f32[4,8] {
  %x = bf16[2,8,8,3]{3,2,1,0} parameter(0)
  %y = f32[4,8]{1,0} parameter(1)
  %while.1 = (s32[], bf16[2,8,8,3]{3,2,1,0}) while(%x), body=%body, config={"known_trip_count":{"n":"3"}}
  %conv.2 = (bf16[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%x), target="__cudnn$convForward"
  %gemm_fusion_dot.1 = f32[4,4]{1,0} fusion(%y, %y), kind=kCustom, calls=%gemm_fusion_dot.1_computation
  %all-reduce-start.1 = f32[4,8]{1,0} all-reduce-start(%y), to_apply=%region_1
  ROOT %loop_add_fusion = f32[4,8]{1,0} fusion(%y), kind=kLoop, calls=%fused_add, metadata={op_name="jit(step)/add"}
}
"""


def test_kernels_are_counted_as_often_as_they_run_with_the_bytes_they_read_and_write():
    of_convolution = 2 * 8 * 8 * (3 + 4) * 2
    assert program_text.kernels(GPU_HLO) == {
        "convolutions": {"count": 3 + 1, "bytes": 4 * of_convolution},
        "matrix products": {"count": 1, "bytes": (4 * 4 + 2 * 4 * 8) * 4},
        "other kernels": {"count": 1, "bytes": 2 * 4 * 8 * 4},
    }


def test_the_table_has_a_row_per_topology_and_a_column_per_kind_of_kernel_and_collective():
    row = {"memory_bytes": {"arguments": 1_500_000, "total": 2_000_000_000}}
    gather = {"all-gather": {"count": 1, "bytes": 65_536_000}}
    tpu = {"topology": "v5e:2x4", "devices": 8, "images": 800, "flops": 6.25e12, "kernels": {}, "collectives": gather}
    products = {"matrix products": {"count": 30, "bytes": 2_500_000_000}}
    gpu = {"topology": "h200:1", "devices": 1, "images": 100, "flops": None, "kernels": products, "collectives": {}}
    assert aot.format_table([tpu | row, gpu | row]).splitlines() == [
        "| topology | devices | images | arguments MB | total MB | TFLOP | matrix products: count, GB "
        "| all-gather: count, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| v5e:2x4 | 8 | 800 | 1.5 | 2,000.0 | 6.25 | 0, 0.0 | 1, 65.5 |",
        "| h200:1 | 1 | 100 | 1.5 | 2,000.0 |  | 30, 2.5 | 0, 0.0 |",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--topology is missing: give at least one"),
        (["--topology", "v5e:2x4"], r'libtpu.* is missing: pip install -e "\.\[tpu\]"'),
        (["--topology", "h200:1"], r'CUDA plugin.* is missing: pip install -e "\.\[cuda12\]"'),
    ],
)
def test_errors_name_the_remedy(monkeypatch, options, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        aot.main(options)


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.aot", *options]
    return subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("topology", ["nonsense", "h200:0"])
def test_an_unknown_topology_is_an_error_of_one_sentence(topology):
    pytest.importorskip("libtpu")
    pytest.importorskip("jax_cuda12_plugin")
    done = run("--topology", "v5e:2x4", "--topology", topology)
    assert done.returncode == 2
    reasons = {"h200:0": "does not give a number of GPUs above 0", "nonsense": "is refused by libtpu (INVALID_ARGUMENT"}
    assert done.stderr.startswith(f"error: --topology '{topology}' {reasons[topology]}")
    assert len(done.stderr.splitlines()) == 1


TINY = ["--width", "4", "--hidden-dim", "16", "--projection-dim", "16", "--train-patches", "2", "--patch-size", "16"]


def test_a_tiny_train_step_compiles_for_eight_tpu_chips(tmp_path):
    pytest.importorskip("libtpu")
    row, table = compiled_tiny(tmp_path, "--topology", "v5e:2x4", "--batch-size", "4")
    assert (row["devices"], row["hosts"], row["images"], row["precision"]) == (8, 2, 32, "bfloat16")
    check_arrays(row)
    assert row["flops"] > 0
    assert table.startswith("| v5e:2x4 | 8 | 32 |")


def test_a_tiny_train_step_compiles_for_two_gpus(tmp_path):
    pytest.importorskip("jax_cuda12_plugin")
    row, _ = compiled_tiny(tmp_path, "--topology", "h200:2", "--batch-size", "4")
    assert (row["devices"], row["hosts"], row["images"], row["precision"]) == (2, 1, 8, "bfloat16")
    check_arrays(row)
    # 20 convolutions, each with two gradients, except that the patches need none. The last stage's maps are 2x2: its
    # four 3x3 convolutions are matrix products.
    assert row["kernels"]["convolutions"]["count"] == 3 * 16 - 1


def test_a_gpus_convolutions_add_the_bias_and_apply_the_relu(tmp_path):
    pytest.importorskip("jax_cuda12_plugin")
    options = ["--program", "embedding", "--embedding-batch-size", "2000", "--valid-patches", "1"]
    row, _ = compiled_tiny(tmp_path, "--topology", "h200:1", "--width", "64", *options)
    assert row["kernels"]["convolutions"]["count"] == 16
    # BatchNorm as kernels of their own would read and write all maps once more, those of the first stage alone:
    of_first_stage = 5 * 2 * 2000 * 16 * 16 * 64 * 2
    assert row["kernels"]["other kernels"]["bytes"] < of_first_stage


def compiled_tiny(tmp_path: Path, *options: str) -> tuple[dict, str]:
    """The only row that a call writes for a tiny encoder, and the table's last line."""
    output = tmp_path / "results" / "aot.json"
    done = run(*TINY, *options, "--output", str(output))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text())["topologies"]
    return row, done.stdout.splitlines()[-1]


def check_arrays(row: dict) -> None:
    """The bytes of a tiny train step's collectives and arguments are at least those of its parameters."""
    encoder = ModelConfig(width=4, hidden_dim=16, projection_dim=16, precision="bfloat16")
    params = jax.eval_shape(lambda: init_encoder(encoder, jax.random.key(0))).params
    size = sum(array.size for array in jax.tree.leaves(params))
    # Gradients of two bytes each are summed; float32 parameters and momentum are arguments.
    assert row["collectives"]["all-reduce"]["bytes"] > 2 * size
    memory = row["memory_bytes"]
    assert memory["arguments"] > 2 * 4 * size
    assert memory["arguments"] + memory["temporaries"] < memory["total"] < sum(list(memory.values())[:4])
