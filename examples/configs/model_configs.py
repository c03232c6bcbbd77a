"""Where each model's files are, for the scripts in examples/inference: edit to taste; flags on the command line win.

Any option of the scripts can be set here for a model, e.g. "num_inference_steps": 30. None means the built-in default:
weights from the Hugging Face cache, the LoRA from ./weights or the cache, sizes and steps from psa.models.
"""

MODEL_CONFIGS = {
    "cogvideo1.5_5b": {"model_path": None},
    "cogvideo_5b": {"model_path": None},
    "cogvideo_5b_lora": {
        "model_path": None,
        # A folder or file, e.g. "./weights/cogvideox-5b-psa-lora/pytorch_lora_weights.safetensors".
        "lora_path": None,
        "preset": "psa_4steps",
    },
    "wan21_1.3b": {"model_path": None},
    "wan21_14b": {"model_path": None},
    "wan22_5b": {"model_path": None},
    "wan22_a14b": {"model_path": None},
}
