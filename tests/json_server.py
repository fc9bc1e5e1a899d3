"""A server of JSON that does what a test told it to: the steps of a scenario in turn, the last one again and again.

``PUT /name`` stores steps, ``GET /name`` returns the requests that came, ``POST /name/...`` runs the next step. A step
has ``status``, ``headers``, ``strict`` (the only fields that the server knows) and one of: ``json``, ``raw`` (text as
it stands), ``by_prompt`` (a step for each value of the request's ``prompt``), ``prefer`` (judge the answer with this
word to be better), ``hang``, ``trickle`` or ``drop``.
"""

import json
import socket
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STEPS, REQUESTS, LOCK = {}, defaultdict(list), threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_PUT(self):
        STEPS[self.name()] = self.body()
        self.reply({"json": {}})

    def do_GET(self):
        self.reply({"json": REQUESTS[self.name()]})

    def do_POST(self):
        body, name = self.body(), self.name()
        with LOCK:
            place = len(REQUESTS[name])
            REQUESTS[name].append({"path": self.path, "body": body, "headers": dict(self.headers)})
        step = STEPS[name][min(place, len(STEPS[name]) - 1)]
        step = step["by_prompt"][json.dumps(body["prompt"])] if "by_prompt" in step else step
        extra = [field for field in body if field not in step.get("strict", body)]
        if extra:
            refused = [{"type": "extra_forbidden", "loc": ["body", field]} for field in extra]
            self.reply({"status": 422, "json": {"detail": refused}})
        elif "hang" in step:
            self.rfile.read(1)  # until the client is gone
        elif "trickle" in step:
            self.trickle()
        elif "drop" in step:
            self.connection.shutdown(socket.SHUT_RDWR)
        elif "prefer" in step:
            first = body["messages"][0]["content"].partition("[Answer B]")[0]
            self.reply({"json": said(f"I think so.\nVerdict: {'A' if step['prefer'] in first else 'B'}\n")})
        else:
            self.reply(step)

    def trickle(self):
        self.send_response(200)
        self.end_headers()
        while True:  # until the client is gone
            try:
                self.wfile.write(b" ")
            except OSError:
                return
            threading.Event().wait(0.02)

    def reply(self, step):
        data = step.get("raw", json.dumps(step.get("json", {}))).encode()
        self.send_response(step.get("status", 200))
        for name, value in {"Content-Length": len(data), **step.get("headers", {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def name(self):
        return self.path.split("/")[1]

    def body(self):
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))


def said(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
