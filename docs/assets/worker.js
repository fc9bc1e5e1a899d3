/* Search in pages that are opened from the disk: browsers forbid workers there, so the worker's script runs in a hidden frame. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.worker = this;
      const start = "self.importScripts = () => {}; self.postMessage = data => frameElement.worker.receive(data);";
      this.frame.srcdoc = `<script>${start}</script><script src="${new URL(url, location.href)}"></script>`;
      this.frame.onload = () => {
        const messages = this.waiting;
        this.waiting = null;
        messages.forEach(data => this.postMessage(data));
      };
      document.body.append(this.frame);
    }
    receive(data) {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      if (this.onmessage) this.onmessage(event);
    }
    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.frame.contentWindow.dispatchEvent(new this.frame.contentWindow.MessageEvent("message", { data }));
    }
    terminate() { this.frame.remove(); }
  };
}
