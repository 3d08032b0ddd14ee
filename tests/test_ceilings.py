"""The two kernels that measure what shared memory can do: they must do the work they claim."""

import pytest
import torch

from sdcore.backends import build_report

if not build_report().get("cuda", {}).get("built"):
    pytest.skip("sdcore._cuda is not built", allow_module_level=True)
from sdcore import _cuda

gpu = pytest.mark.gpu


def count(bins, updates, blocks, threads, seed=0, device=0):
    out = torch.zeros(bins, dtype=torch.int32, device=f"cuda:{device}")
    stream = torch.cuda.current_stream(device).cuda_stream
    _cuda.shared_atomics(out.data_ptr(), bins, updates, blocks, threads, seed, device, stream)
    return out


def gather(table, reads, blocks, threads, seed=0):
    out = torch.full((blocks * threads,), float("nan"), device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    _cuda.shared_gathers(
        table.data_ptr(), table.numel(), out.data_ptr(), reads, blocks, threads, seed, 0, stream
    )
    return out


def most_bins():
    return _cuda.devices()[0]["shared_memory_per_block"] // 4


@gpu
def test_devices():
    device = _cuda.devices()[0]
    properties = torch.cuda.get_device_properties(0)
    assert device["name"] == properties.name
    assert device["compute_capability"] == torch.cuda.get_device_capability(0)
    assert device["multiprocessors"] == properties.multi_processor_count
    assert device["memory_bytes"] == properties.total_memory
    assert device["l2_bytes"] == properties.L2_cache_size
    assert len(_cuda.devices()) == torch.cuda.device_count()


SHAPES = [(1, 1, 1, 1), (7, 5, 3, 33), (256, 17, 2, 64), (12345, 64, 5, 1000)]


@gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("bins, updates, blocks, threads", SHAPES)
def test_every_update_is_counted(bins, updates, blocks, threads):
    out = count(bins, updates, blocks, threads)
    assert out.sum().item() == updates * blocks * threads
    assert out.min().item() >= 0
    # It adds to what is there.
    stream = torch.cuda.current_stream().cuda_stream
    _cuda.shared_atomics(out.data_ptr(), bins, updates, blocks, threads, 1, 0, stream)
    assert out.sum().item() == 2 * updates * blocks * threads


@gpu
def test_the_largest_table():
    bins = most_bins()
    assert count(bins, 100, 4, 1024).sum().item() == 100 * 4 * 1024
    assert gather(torch.ones(bins, device="cuda"), 100, 4, 1024).eq(100).all()


@gpu
@pytest.mark.parametrize("bins", [32, 1000, 4096])
def test_updates_are_uniform(bins):
    """Six standard deviations: a billion to one against a right generator."""
    counts = count(bins, 1024, 64, 256).double()
    expected = 1024 * 64 * 256 / bins
    assert (counts - expected).abs().max().item() < 6 * expected**0.5


@gpu
def test_seeds():
    first, again, other, far = (count(999, 8, 2, 64, seed=s) for s in (5, 5, 6, 5 + 2**32))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, far)


@gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("bins, reads, blocks, threads", SHAPES)
def test_every_read_is_summed(bins, reads, blocks, threads):
    assert gather(torch.ones(bins, device="cuda"), reads, blocks, threads).eq(reads).all()


@gpu
def test_reads_are_the_updates():
    """With the same seed both kernels visit the same slots, so sums of integers must agree."""
    table = torch.arange(777, device="cuda", dtype=torch.float32)
    read = gather(table, 33, 3, 100).double().sum()
    counted = (count(777, 33, 3, 100) * torch.arange(777, device="cuda")).sum()
    assert read.item() == counted.item()


@gpu
def test_runs_on_the_given_stream():
    stream = torch.cuda.Stream()
    out = torch.zeros(64, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _cuda.shared_atomics(out.data_ptr(), 64, 10, 2, 32, 0, 0, stream.cuda_stream)
    assert out.sum().item() == 0  # Captured, not run.
    graph.replay()
    graph.replay()
    assert out.sum().item() == 2 * 10 * 2 * 32


@gpu
def test_restores_the_current_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(1):
        assert count(64, 10, 2, 32, device=0).sum().item() == 10 * 2 * 32
        assert torch.cuda.current_device() == 1
        assert (torch.ones(8, device="cuda") + 1).eq(2).all()


GOOD = {
    "out": 4096,
    "bins": 64,
    "updates_per_thread": 1,
    "blocks": 1,
    "threads": 32,
    "seed": 0,
    "device": 0,
    "stream": 0,
}


@pytest.mark.parametrize(
    "name, value",
    [
        ("out", 0),
        ("out", 4097),
        ("threads", 0),
        ("threads", 1025),
        ("blocks", 0),
        ("blocks", 2**31),
        ("updates_per_thread", 0),
        ("updates_per_thread", 2**27),
        pytest.param("bins", 0, marks=gpu),
        pytest.param("bins", 10**6, marks=gpu),
        pytest.param("device", -1, marks=gpu),
        pytest.param("device", 99, marks=gpu),
    ],
)
def test_wrong_arguments(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*; got {value}$"):
        _cuda.shared_atomics(**{**GOOD, name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_cuda_said():
    with pytest.raises(RuntimeError, match=r"CUDA: .*cudaGetDeviceCount"):
        _cuda.shared_atomics(**GOOD)
