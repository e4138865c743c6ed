"""Answers of a model sharded over two real processes (FSDP on gloo), with answers of unequal lengths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RANK = """
import json, sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.models.token_spread import token_spread, visual_features
from alignvlm_pl.module import AlignVLMModule
from callbacks.connector_health import undisturbed

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
torch.manual_seed(0)
module = AlignVLMModule(spec=tiny_spec(folder / f"tokenizer{rank}"))
module.configure_model()
module.eval()
picture = {"type": "image", "image": Image.new("RGB", (60, 40), (90 * rank, 50, 7))}
turns = [{"role": "user", "content": [picture, {"type": "text", "text": "what?" * (1 + rank)}]}]
batch = module.processor.apply_chat_template([turns], tokenize=True, add_generation_prompt=True)
module.processor.post_process_image_text_to_text = lambda ids: ids.tolist()  # ids that decode to nothing too
plain = SimpleNamespace(forward_context=nullcontext)
answers, spreads = [], []
for wrap in (False, True):
    root = module
    if wrap:
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        root = FullyShardedDataParallel(module, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    module._trainer = SimpleNamespace(precision_plugin=plain, strategy=SimpleNamespace(model=root))
    for factor in (1.0, 2.0):
        pixels = batch["pixel_values"][: 1 - rank]  # no image on the second rank, which must run all the same
        with undisturbed(module._trainer, module, writeback=True):
            net = module.net
            net.connector.norm2.weight.data.mul_(factor)
            features = visual_features(net, pixels, limit=40)
            spreads.append(token_spread(net.connector, features, net.get_input_embeddings().weight, limit=40))
    with undisturbed(module._trainer, module, writeback=True):
        spreads.append([float(module.net.connector.norm2.weight.data.mean())])
        module.net.connector.norm2.weight.data.mul_(0.5)
    answers.append(module.generate(batch, max_new_tokens=3 + 4 * rank))
print(json.dumps([answers, spreads]))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_model_answers_as_the_whole_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        told, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors[-2000:]
        (whole, sharded), spreads = json.loads(told.splitlines()[-1])
        assert whole == sharded
        # The connector can be measured, and its gain set, as if it were whole (callbacks/connector_health.py).
        assert spreads[2] == spreads[5] == [2.0]
        for one, other in zip(spreads[:3], spreads[3:], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        assert len(whole[0]) in (3, 7)
