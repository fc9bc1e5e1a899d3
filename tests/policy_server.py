"""An inference server for tests: it samples from a model folder token by token, and loads another when asked.

Started with a folder. ``POST /v1/completions`` answers as vLLM does, ``POST /update_weights_from_disk`` loads, and
``GET /`` returns how often each was asked. Written without the generator that the tests compare it with.
"""

import json
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

import torch

from lightning_lm.models import load_huggingface

MODEL, ASKED, LOCK = {}, Counter(), Lock()


@torch.no_grad()
def sample(body, number):
    generator = torch.Generator().manual_seed(body["seed"] + number)
    ids, logprobs, finish = list(body["prompt"]), [], "length"
    while len(logprobs) < body["max_tokens"]:
        scores = (MODEL["model"](torch.tensor([ids]))[0, -1].double() / body["temperature"]).log_softmax(-1)
        ids.append(int(torch.multinomial(scores.exp(), 1, generator=generator)))
        logprobs.append(scores[ids[-1]].item())
        if ids[-1] in body["stop_token_ids"]:
            finish = "stop"
            break
    new = ids[len(body["prompt"]) :]
    scored = {"tokens": [f"token_id:{token}" for token in new], "token_logprobs": logprobs}
    return {"index": number, "text": "", "token_ids": new, "finish_reason": finish, "logprobs": scored}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply(ASKED)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK:
            ASKED[self.path] += 1
            if self.path == "/v1/completions":
                self.reply({"choices": [sample(body, number) for number in range(body["n"])]})
            else:
                self.reply(load(body["model_path"]))

    def reply(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def load(folder):
    try:
        MODEL["model"] = load_huggingface(folder).eval()
    except ValueError as error:
        return {"success": False, "message": str(error)}
    return {"success": True}


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert load(sys.argv[1])["success"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
