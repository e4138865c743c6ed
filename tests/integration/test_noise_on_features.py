"""The paper's noise experiment in small: noise on the features moves ALIGN's outputs less than the MLP's."""

import pytest
import torch
from torch import Tensor

COLOURS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
PATCHES, ASKED, STEPS, BATCH = 16, 4, 150, 32


def batch(generator: torch.Generator, image_token: int) -> dict[str, Tensor]:
    """Tiles of 4 x 4 patches of eight colours; the answer names those of the first four."""
    colours = torch.randint(len(COLOURS), (BATCH, PATCHES), generator=generator)
    pixels = COLOURS[colours].view(BATCH, 4, 4, 3).permute(0, 3, 1, 2)
    pixels = pixels.repeat_interleave(14, dim=2).repeat_interleave(14, dim=3)
    answers = colours[:, :ASKED] + 60
    return {
        "pixel_values": pixels + 0.1 * torch.randn(pixels.shape, generator=generator),
        "num_tiles": torch.ones(BATCH, dtype=torch.long),
        "input_ids": torch.cat([torch.full((BATCH, PATCHES), image_token), answers], dim=1),
        "labels": torch.cat([torch.full((BATCH, PATCHES), -100), answers], dim=1),
    }


def moved_by_noise(connector: str, folder: str) -> tuple[float, dict[float, float]]:
    """Train connector and LLM on a frozen tower; the last loss, and sigma -> movement relative to the output's norm."""
    from alignvlm_pl.models.build import build_model, build_processor
    from alignvlm_pl.models.tiny import tiny_spec

    torch.manual_seed(0)
    spec = tiny_spec(folder, connector={"type": connector})
    processor = build_processor(spec)
    model = build_model(spec, processor)
    model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(10)
    for _ in range(STEPS):
        loss = model(**batch(generator, processor.image_token_id)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        features = model.encode_images(batch(generator, processor.image_token_id)["pixel_values"])
        assert features.std() == pytest.approx(1, abs=0.1)  # so that sigma counts in standard deviations
        table = model.get_input_embeddings().weight
        clean = model.connector(features, table).embeds
        noise = torch.randn(features.shape, generator=generator)
        moved = {}
        for sigma in (0.3, 1.0, 3.0):
            noisy = model.connector(features + sigma * noise, table).embeds
            moved[sigma] = float((noisy - clean).norm() / clean.norm())
    return float(loss.detach()), moved


@pytest.mark.slow
def test_noise_on_the_features_moves_align_less_than_the_mlp(tmp_path):
    """Both have learned the task; same seed, batches, optimizer and noise.

    Movement is relative to the output's norm, which is what an LLM with a norm at its entry sees. Measured over two
    seeds: ALIGN 0.04, 0.33-0.37, 0.84-0.85; MLP 0.12, 0.40-0.41, 1.2-1.3. The paper's other measure, the
    cosine distance (0.004 against 0.39 at sigma 3), is not asserted: here it is 0.29-0.34 against 0.30-0.35.
    """
    (align_loss, align), (mlp_loss, mlp) = (moved_by_noise(name, str(tmp_path / name)) for name in ("align", "mlp"))
    assert align_loss < 0.1, "ALIGN has not learned the task"
    assert mlp_loss < 0.1, "the MLP has not learned the task"
    for sigma, moved in align.items():
        assert moved < 0.95 * mlp[sigma], f"sigma {sigma}: ALIGN {moved:.3f}, MLP {mlp[sigma]:.3f}"
