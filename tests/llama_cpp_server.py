"""llama.cpp's own server with a small Llama, for the test that asks it: ``llama_cpp_server.py WEIGHTS.npz FOLDER``.

The archive holds the weights under their names in transformers, and ``config``, JSON. Prints the port.
"""

import json
import socket
import sys
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(weights, config, file):
    writer = gguf.GGUFWriter(file, "llama")
    size, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(size)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(size // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{token}>".encode() for token in range(vocab)])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([int(gguf.TokenType.CONTROL)] * vocab)
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    for name, values in weights.items():
        stem = name.removesuffix(".weight")
        if stem not in TOP:
            number, kind = stem.removeprefix("model.layers.").split(".", 1)
            stem, name = f"blk.{number}.{LAYER[kind]}", kind
        of_heads = {"self_attn.q_proj": heads, "self_attn.k_proj": config["num_key_value_heads"]}.get(name)
        writer.add_tensor(f"{TOP.get(stem, stem)}.weight", values if of_heads is None else by_pairs(values, of_heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_pairs(values, heads):
    """The rows of each head in llama.cpp's order: its rotary positions turn neighbours."""
    rows, columns = values.shape
    return np.ascontiguousarray(values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(rows, -1)


def main():
    weights = dict(np.load(sys.argv[1]))
    file = Path(sys.argv[2]) / "model.gguf"
    write(weights, json.loads(str(weights.pop("config"))), file)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port = str(file), port
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 512, 8, False, -1
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(settings)
    print(port, server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
