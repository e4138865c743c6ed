"""The Hugging Face model, config and processor; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .align import AlignConnector, ConnectorOutput
from .configuration import AlignVLMConfig
from .connectors import CONNECTORS, build_connector
from .modeling import AlignVLMForConditionalGeneration, AlignVLMOutput
from .pp_ocr import PPOCRVisionConfig, PPOCRVisionModel
from .processing import AlignVLMProcessor, EncodedConversation

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
    "EncodedConversation",
    "PPOCRVisionConfig",
    "PPOCRVisionModel",
    "build_connector",
]
