"""The parts of the embedded model before training: architecture, tokenizer, processor."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlm_steer.tiny.dice import Dice
from vlm_steer.tiny.language import (
    EXISTENCE_TEMPLATES,
    LONG_PROMPTS,
    SHORT_PROMPTS,
    SUFFIXES,
    conversations,
    existence_question,
)
from vlm_steer.tiny.scenes import IMAGE_SIZE, scene
from vlm_steer.tiny.world import CATEGORIES

__all__ = ["CHAT_TEMPLATE", "PATCH", "build_model", "build_processor", "save"]

PATCH = 12
"""Side of a patch in pixels; an image makes 8 x 8 of them."""

# The tokenizer puts BOS in front, so the template must not.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}USER:{{ ' ' }}
{%- elif message['role'] == 'assistant' -%}ASSISTANT:{{ ' ' }}
{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}<image>{{ '\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}</s>{%- else -%}{{ ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}
"""

_VOCABULARY_CAP = 2000
_TEXT_SCENES = 4000
_LANGUAGE_WIDTH, _VISION_WIDTH = 192, 128


def build_processor() -> LlavaProcessor:
    """Build the processor, its tokenizer learnt from the captions and questions of the world."""
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # untyped upstream
        tokenizer_object=_learn_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(  # type: ignore[no-untyped-call]  # untyped upstream
        image_processor=CLIPImageProcessorPil(
            size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        # The class token counts as one more, and the default strategy drops it again.
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Build the untrained model for a processor; weights come from the global random state.

    A CLIP vision tower of 6 layers, a projector of 2 and a Llama of 6, 4.2 million weights in all.
    """
    tokenizer = processor.tokenizer
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=_VISION_WIDTH,
        intermediate_size=4 * _VISION_WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=_VISION_WIDTH,
        hidden_act="gelu",
    )
    # About 1 / sqrt(width): the customary 0.02 is meant for models twenty times as wide.
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_LANGUAGE_WIDTH,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=1024,
        initializer_range=0.06,
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    _widen_initialisation(model)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # untyped upstream
        max_new_tokens=128, **special
    )
    return model


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, directory: Path) -> None:
    """Write a complete model directory.

    The weights are stored in bfloat16, but the configuration asks for the precision in which the
    model was trained, so that loading gives that one unless told otherwise.
    """
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=state)
    processor.save_pretrained(directory)


@torch.no_grad()
def _widen_initialisation(model: LlavaForConditionalGeneration) -> None:
    """Draw the projector's matrices from a normal law of width 1 / sqrt(inputs).

    CLIP initialises itself by its width; wider draws for its matrices made no difference.
    """
    for module in model.model.multi_modal_projector.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)


def _learn_tokenizer() -> Tokenizer:
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_CAP,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", special.index("<s>"))]
    )
    return tokenizer


def _texts() -> list[str]:
    texts = ["USER: ASSISTANT:\n"]
    for index in range(_TEXT_SCENES):
        dice = Dice("vlm_steer.tiny", "tokenizer", index)
        texts += [
            f"USER: {turn.question} ASSISTANT: {turn.answer}"
            for turn in conversations(dice, scene("train", index))
        ]
    for template in EXISTENCE_TEMPLATES:
        texts += [
            existence_question(name, template) + suffix
            for name in CATEGORIES
            for suffix in ("", *SUFFIXES)
        ]
    return [*texts, *LONG_PROMPTS, *SHORT_PROMPTS]
