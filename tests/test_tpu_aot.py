"""The collectives of a compiled program and, with libtpu installed, compiling a tiny train step for TPUs."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import tpu_aot
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
    assert tpu_aot.collectives(HLO) == {
        "all-reduce": {"count": 3, "bytes": sum(all_reduces), "largest": (400, "f32[100]")},
        "all-gather": {"count": 1, "bytes": 320, "largest": (320, "f32[8,10]")},
        "collective-permute": {"count": 1, "bytes": 24, "largest": (24, "s32[6]")},
        "all-to-all": {"count": 1, "bytes": 7 + 2, "largest": (7, "f8e4m3fn[7]")},
        "reduce-scatter": {"count": 1, "bytes": 128, "largest": (128, "f64[16]")},
    }


def test_the_table_has_a_row_per_topology_and_a_column_per_kind_of_collective():
    row = {"topology": "v5e:2x4", "chips": 8, "batch_size": 800, "flops": 6.25e12}
    row |= {"memory_bytes": {"arguments": 1_500_000, "total": 2_000_000_000}}
    gather = {"all-gather": {"count": 1, "bytes": 65_536_000}}
    table = tpu_aot.format_table([row | {"collectives": {}}, row | {"topology": "v5e:8x8", "collectives": gather}])
    assert table.splitlines() == [
        "| topology | chips | images | arguments MB | total MB | TFLOP | all-gather: count, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| v5e:2x4 | 8 | 800 | 1.5 | 2,000.0 | 6.25 | 0, 0.0 |",
        "| v5e:8x8 | 8 | 800 | 1.5 | 2,000.0 | 6.25 | 1, 65.5 |",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--topology is missing: give at least one"),
        (["--topology", "v5e:2x4", "--images-per-chip", "0"], "--images-per-chip is 0: give"),
        (["--topology", "v5e:2x4"], r'libtpu.* is missing: pip install -e "\.\[tpu\]"'),
    ],
)
def test_errors_name_the_remedy(monkeypatch, options, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        tpu_aot.main(options)


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.tpu_aot", *options]
    return subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=300)


def test_an_unknown_topology_is_an_error_of_one_sentence():
    pytest.importorskip("libtpu")
    done = run("--topology", "v5e:2x4", "--topology", "nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --topology 'nonsense' is refused by libtpu (INVALID_ARGUMENT")
    assert len(done.stderr.splitlines()) == 1


def test_a_tiny_train_step_compiles_for_eight_chips(tmp_path):
    pytest.importorskip("libtpu")
    model = ["--width", "4", "--hidden-dim", "16", "--projection-dim", "16", "--train-patches", "2"]
    options = ["--topology", "v5e:2x4", "--images-per-chip", "4", "--patch-size", "16"]
    done = run(*options, *model, "--output", str(tmp_path / "results" / "tpu.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results" / "tpu.json").read_text())
    assert set(results["versions"]) == {"jax", "jaxlib", "libtpu"}
    (row,) = results["topologies"]
    assert (row["chips"], row["hosts"], row["batch_size"], row["precision"]) == (8, 2, 32, "bfloat16")
    encoder = ModelConfig(width=4, hidden_dim=16, projection_dim=16, precision="bfloat16")
    params = jax.eval_shape(lambda: init_encoder(encoder, jax.random.key(0))).params
    size = sum(array.size for array in jax.tree.leaves(params))
    # Lower bounds: gradients of two bytes each are summed; float32 parameters and momentum are arguments.
    assert row["collectives"]["all-reduce"]["bytes"] > 2 * size
    memory = row["memory_bytes"]
    assert memory["arguments"] > 2 * 4 * size
    assert memory["arguments"] + memory["temporaries"] < memory["total"] < sum(list(memory.values())[:4])
    assert row["flops"] > 0
    assert done.stdout.splitlines()[-1].startswith("| v5e:2x4 | 8 | 32 |")
