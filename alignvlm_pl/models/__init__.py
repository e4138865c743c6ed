"""AlignVLM in Hugging Face's terms; importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .align import AlignConnector, ConnectorOutput
from .configuration import AlignVLMConfig
from .connectors import CONNECTORS, build_connector
from .connectors.mlp import MLPConnector
from .modeling import AlignVLMForConditionalGeneration, AlignVLMOutput
from .pp_ocr import PPOCRVisionConfig, PPOCRVisionModel
from .processing import AlignVLMProcessor, Encoded

AutoConfig.register("alignvlm", AlignVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(AlignVLMConfig, AlignVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(AlignVLMConfig, AlignVLMProcessor, exist_ok=True)

__all__ = [
    "CONNECTORS",
    "AlignConnector",
    "AlignVLMConfig",
    "AlignVLMForConditionalGeneration",
    "AlignVLMOutput",
    "AlignVLMProcessor",
    "ConnectorOutput",
    "Encoded",
    "MLPConnector",
    "PPOCRVisionConfig",
    "PPOCRVisionModel",
    "build_connector",
]
