"""Python runs this when it starts and this folder is in PYTHONPATH: in a Ray of `worker_hook`."""

import worker_hook

worker_hook.install()
