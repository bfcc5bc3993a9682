import json

from relic.metrics.revisit import RevisitRule
from relic.suite.report import build_report, write_report
from relic.suite.run import TRUTH
from relic.suite.summary import machine
from tests.suite.runs import contestants


def test_the_report_holds_everything_itself(finished):
    root, records = finished
    report = build_report(
        records, contestants(), title="a <test>", rule=str(RevisitRule()), settings={"suite": "relic"},
        machine=machine("cpu"), not_measured=["LPIPS: not measured"],
        vbench={"short": {"dynamic_degree": 0.5}},
    )  # fmt: skip
    write_report(root, report)
    assert json.loads((root / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["cases_scored"] == 2 and len(report["skipped"]) == 2
    assert report["summary"]["short"]["all"]["vbench/dynamic_degree"]["mean"] == 0.5
    assert report["summary"][TRUTH]["all"]["memory/clips"] == {"sum": 1}
    page = (root / "report.html").read_text()
    assert page.count("<video") == 2 and page.count("data:video/mp4") == 2
    assert "a &lt;test&gt;" in page and "LPIPS: not measured" in page and "beyond the horizon" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert "floor: first frame, repeated" in page and "dynamic degree" in page
