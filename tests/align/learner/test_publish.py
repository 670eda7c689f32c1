"""A learner sends its weights off in buckets, by any transport the same, and holds no more of the model than a bucket while it does."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config

from align.learner.group import LearnerGroup
from align.model.names import to_checkpoint
from align.model.policy import load_policy, load_tokenizer
from align.recipe import LearnerOptions, ModelOptions, OptimizerOptions
from rollout import DirectorySync, ObjectStoreSync

NANO = Path(__file__).parents[3] / "recipes" / "nano" / "policy"
ZERO_3 = LearnerOptions(ranks=2, zero_stage=3, optimizer=OptimizerOptions(learning_rate=1e-3))
SMALL = 2**16
MIB = 2**20


@pytest.fixture(scope="module")
def learner(ray_session: None, policy: ModelOptions) -> Iterator[LearnerGroup]:
    group = LearnerGroup(policy, ZERO_3, seed=0)
    group.wait_until_ready()
    yield group
    group.close()


def test_both_transports_deliver_the_checkpoint(learner: LearnerGroup, policy: ModelOptions, tmp_path: Path) -> None:
    expected = dict(to_checkpoint((n, p.detach()) for n, p in load_policy(policy).named_parameters()))
    for weight_sync in (ObjectStoreSync(SMALL), DirectorySync(tmp_path / "weights", SMALL)):
        source = weight_sync.publish(learner)
        found = {name: tensor for bucket in source.buckets() for name, tensor in bucket.items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        source.release()
    assert learner.trained.sent_bytes == sum(t.numel() * t.element_size() for t in expected.values())


def test_a_directory_that_cannot_be_written_is_named(learner: LearnerGroup, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        DirectorySync(tmp_path / "file").publish(learner)


def own_memory() -> int:
    """Bytes of this process that are no files and not shared."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_zero_3_no_rank_ever_has_more_than_two_layers_beyond_its_share(ray_session: None, tmp_path: Path) -> None:
    """Of a model of 16 layers with 14 MiB each."""
    import ray

    config = DeepseekV2Config.from_pretrained(NANO)
    config.num_hidden_layers, config.hidden_size, config.n_routed_experts = 16, 256, 64
    load_tokenizer(NANO).save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[5].parameters())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    del model
    with closing(LearnerGroup(ModelOptions(path=str(tmp_path)), ZERO_3, seed=0)) as group:
        group.wait_until_ready()

        def growth(worker: Any) -> int:
            """How much this rank grows at most while the weights go through it."""
            before, peak, over = own_memory(), 0, threading.Event()

            def watch() -> None:
                nonlocal peak
                while not over.is_set():
                    peak = max(peak, own_memory() - before)
                    time.sleep(0.001)

            thread = threading.Thread(target=watch)
            thread.start()
            for _ in worker.publish(iter, layer / 2):
                pass
            over.set()
            thread.join()
            return peak

        # The first time also loads what stays: code, and the buffers of gloo and of Ray.
        for time_of in ("first", "second"):
            grown = ray.get([rank.__ray_call__.remote(growth) for rank in group._ranks])
            print(f"{time_of} time: rank 0 grew by {grown[0] / MIB:.0f} MiB, rank 1 by {grown[1] / MIB:.0f}")
        print(f"a layer has {layer / MIB:.0f} MiB, the model {whole / MIB:.0f}")
        assert whole > 10 * layer
        assert max(grown) <= 2 * layer
