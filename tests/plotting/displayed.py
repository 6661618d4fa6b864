"""What a notebook is shown."""

import base64

from IPython.utils.capture import capture_output

from utils import plotting


def shown(description="A sentence."):
    with capture_output() as captured:
        plotting.show(description)
    return captured.outputs


def png_of(output):
    data = output.data["image/png"]
    return base64.b64decode(data) if isinstance(data, str) else data
