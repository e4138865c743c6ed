"""The LightningModule, what a stage is, optimizer, LoRA, FLOPs, export."""
