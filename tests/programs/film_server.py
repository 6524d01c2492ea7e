"""Serves rtsp://ADDRESS/film by GStreamer: sound out of a file, as it is, and a picture beside it.

Usage: film_server.py ADDRESS FILE
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")

from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

SOUND = "rawaudioparse format=pcm pcm-format=s16be sample-rate=44100 num-channels=1 ! rtpL16pay name=pay0 pt=97"
PICTURE = "video/x-raw,format=I420,width=160,height=120,framerate=25/1 ! jpegenc ! rtpjpegpay name=pay1 pt=26"

address, file = sys.argv[1:]
Gst.init(None)
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(f"( filesrc location={file} ! {SOUND} videotestsrc ! {PICTURE} )")
server = GstRtspServer.RTSPServer()
server.set_address(address)
server.set_service("554")
server.get_mount_points().add_factory("/film", factory)
server.attach(None)
GLib.MainLoop().run()
