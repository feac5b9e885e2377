"""Headless Chromium for tests, spoken to over two pipes in its DevTools protocol: no driver, no port."""
import base64
import json
import os
import shutil
import subprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A page in a window; `requests` are the addresses it has asked for, `errors` what its console said."""

    def __init__(self, profile, width=1280, height=900):
        ours, theirs = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", 'exec 3<&$0 4>&$1 && shift && exec "$@"', str(theirs[0]), str(ours[1]), CHROMIUM,
             "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}",
             f"--window-size={width},{height}", "about:blank"],
            pass_fds=(theirs[0], ours[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        os.close(theirs[0])
        os.close(ours[1])
        self.read, self.write = os.fdopen(ours[0], "rb"), os.fdopen(theirs[1], "wb", buffering=0)
        self.count, self.session, self.requests, self.errors, self.loaded = 0, None, [], [], 0
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
             mobile=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.write.close()
        self.read.close()
        try:
            self.process.wait(5)  # it ends when its pipe does
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __call__(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def next(self):
        data = bytearray()
        while not data.endswith(b"\0"):
            piece = self.read.read(1)
            assert piece, "chromium has ended"
            data += piece
        message = json.loads(data[:-1])
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "?"))
        elif kind == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        elif kind == "Page.loadEventFired":
            self.loaded += 1
        return message

    def open(self, address):
        self("Page.navigate", url="about:blank")  # or a new fragment alone loads nothing
        while not self.loaded:
            self.next()
        self.loaded = 0
        self.requests.clear()
        self.errors.clear()
        self("Page.navigate", url=address)
        while not self.loaded:
            self.next()
        self.loaded = 0
        self.frames()

    def frames(self):
        """Wait for two, so that what was asked for is drawn."""
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def js(self, code):
        done = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def key(self, name, code):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)
        self.frames()

    def mouse(self, x, y):
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.frames()

    def scheme(self, name):
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])
        self.frames()

    def picture(self, file=None):
        data = base64.b64decode(self("Page.captureScreenshot")["data"])
        if file:
            with open(file, "wb") as f:
                f.write(data)
        return data
