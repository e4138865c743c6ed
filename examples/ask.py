"""Ask a question about a page: the export of a stage, loaded by the Auto classes of transformers, without Lightning.

python examples/ask.py runs/demo/3-instruct/hf page.png "What is the total?"
"""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import alignvlm_pl.models  # noqa: F401  (registers the model with the Auto classes)


def ask(folder: str, image: str, question: str) -> str:
    """Return what the model in `folder` generates for a question about an image file."""
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True
    )
    ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    answer: str = processor.post_process_image_text_to_text(ids[:, inputs["input_ids"].shape[1] :])[0]
    return answer


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.stdout.write(ask(*sys.argv[1:]) + "\n")
