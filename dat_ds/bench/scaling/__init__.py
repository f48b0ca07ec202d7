"""Strong and weak scaling over ranks, ZeRO stages, codecs and link speeds."""
