"""The same lines from a Ray cluster; needs the extra `ray`."""

import threading
import time

import psutil
import pytest
from conftest import DATA
from jobs import good, results, run, write

import twotower_jax as tt
from twotower_jax.engine import cluster, job

ray = pytest.importorskip("ray")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module", autouse=True)
def two_cores():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def on_ray(source, target, **options):
    model = str(DATA / "tiny-0")
    options = job.Options(slots=8, **options)
    return cluster.run(model, str(source), str(target), options, dtype="float32", actors=2, gpus=None)


def engines():
    """The actors' processes."""
    return [p for p in psutil.process_iter(["cmdline"]) if "Answers" in " ".join(p.info["cmdline"] or [])]


def test_an_actor_is_killed(tmp_path, monkeypatch):
    """500 requests by two actors, of which one is killed in the middle: the lines of one engine, each once."""
    monkeypatch.setattr(cluster, "PIECE", 25)
    source = write(tmp_path / "in.jsonl", [*map(good, range(500)), b"not JSON"])
    target, killed = tmp_path / "out.jsonl", []

    def kill():
        while target.stat().st_size < 100_000 if target.exists() else True:
            time.sleep(0.05)
        killed.append(engines()[0])
        killed[0].kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    summary = on_ray(source, target)
    thread.join(timeout=1)
    assert killed, "the job ended before anything was killed"
    assert (summary.lines, summary.results, summary.errors) == (501, 500, 1)
    run(source, tmp_path / "alone.jsonl")
    assert results(target) == results(tmp_path / "alone.jsonl")
    before = target.read_bytes()
    assert on_ray(source, target).done_before == 501
    assert target.read_bytes() == before


def test_a_folder(tmp_path):
    """JSONL and Parquet; what is null in a table is not said."""
    import pyarrow as pa

    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    write(folder / "a.jsonl", map(good, range(5)))
    rows = [{"prompt": [5, 6, 7], "mode": "ar"}, {"prompt": [8], "max_tokens": 9}]
    pq.write_table(
        pa.Table.from_pylist(
            rows, pa.schema([("prompt", pa.list_(pa.int64())), ("mode", pa.string()), ("max_tokens", pa.int32())])
        ),
        folder / "more" / "b.parquet",
    )
    summary = on_ray(folder, tmp_path / "out")
    assert (summary.lines, summary.results, summary.errors) == (7, 7, 0)
    found = results(tmp_path / "out" / "more" / "b.parquet.results.jsonl")
    assert {r["custom_id"] for r in found.values()} == {"line-1", "line-2"}
    assert len(results(tmp_path / "out" / "a.jsonl.results.jsonl")) == 5


def test_bad_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(tt.InputError, match=r"holds no \.jsonl or \.parquet file"):
        on_ray(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty" / "a.jsonl").write_text("")
    with pytest.raises(tt.InputError, match="results of a folder go to a folder"):
        on_ray(tmp_path / "empty", tmp_path / "file")
