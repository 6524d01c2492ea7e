"""Plays a film by GStreamer for two seconds, its sound into one file, its pictures into another.

Usage: film_client.py URL SOUND PICTURES
"""

import sys

import gi

gi.require_version("Gst", "1.0")

from gi.repository import GLib, Gst  # noqa: E402

url, sound, pictures = sys.argv[1:]
Gst.init(None)
pipeline = Gst.parse_launch(
    f"rtspsrc name=film location={url} protocols=udp latency=200"
    f" film. ! application/x-rtp,media=audio ! rtpL16depay ! filesink location={sound} async=false"
    f" film. ! application/x-rtp,media=video ! rtpjpegdepay ! filesink location={pictures} async=false"
)
loop = GLib.MainLoop()
GLib.timeout_add(2500, loop.quit)
pipeline.set_state(Gst.State.PLAYING)
loop.run()
pipeline.set_state(Gst.State.NULL)
