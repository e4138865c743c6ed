"""Answers of a model sharded over two real processes (FSDP2 on gloo), with answers of unequal lengths."""

import json
from pathlib import Path

import pytest
import torch

from tests.drills.launch import run_programs

ROOT = Path(__file__).parents[2]

RANK = """
import json, sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from alignvlm_pl.ops import full_weight
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.models.token_spread import token_spread, visual_features
from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.strategies.sharding import shard
from callbacks.connector_health import undisturbed

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
torch.manual_seed(0)
module = AlignVLMModule(spec=tiny_spec(folder / f"tokenizer{rank}", tied=False))
module.configure_model()
module.eval()
picture = {"type": "image", "image": Image.new("RGB", (60, 40), (90 * rank, 50, 7))}
turns = [{"role": "user", "content": [picture, {"type": "text", "text": "what?" * (1 + rank)}]}]
batch = module.processor.apply_chat_template([turns], tokenize=True, add_generation_prompt=True)
module.processor.post_process_image_text_to_text = lambda ids: ids.tolist()  # ids that decode to nothing too
module._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=nullcontext))
answers, spreads = [], []
for sharded in (False, True):
    if sharded:
        shard(module.net, init_device_mesh("cpu", (2,)), policy=MixedPrecisionPolicy())
    for factor in (1.0, 2.0):
        pixels = batch["pixel_values"][: 1 - rank]  # no image on the second rank, which must run all the same
        module.net.connector.norm2.weight.data.mul_(factor)
        with undisturbed(module._trainer, module):
            net = module.net
            features = visual_features(net, pixels, limit=40)
            spreads.append(token_spread(net.connector, features, net.get_input_embeddings().weight, limit=40))
    spreads.append([float(full_weight(module.net.connector.norm2.weight).mean())])
    module.net.connector.norm2.weight.data.mul_(0.5)
    answers.append(module.generate(batch, max_new_tokens=3 + 4 * rank))
    columns = torch.tensor([7, 65])
    answers.append(module.net.read(batch["pixel_values"], columns).tolist())
print(json.dumps([answers, spreads]))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_model_answers_as_the_whole_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    for output in run_programs(*[[script, rank, tmp_path] for rank in range(2)]):
        (whole, read, sharded, sharded_read), spreads = json.loads(output.splitlines()[-1])
        assert whole == sharded
        assert torch.allclose(torch.tensor(read), torch.tensor(sharded_read), atol=1e-5)
        # The connector can be measured, and its gain set, as if it were whole (callbacks/connector_health.py).
        assert spreads[2] == spreads[5] == [2.0]
        for one, other in zip(spreads[:3], spreads[3:], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        assert len(whole[0]) in (3, 7)
