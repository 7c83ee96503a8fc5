from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
s = config["DEFAULT"]
setup(name=s["lib_name"], version=s["version"], packages=find_packages(include=["hific_nb", "hific_nb.*"]),
      install_requires=s["requirements"].split())
