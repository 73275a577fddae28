"""Recompute the verdict of a report without any code of the project: independent_verifier.py REPORT."""
# fmt: off

import base64
import hashlib
import json
import sys
from datetime import datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from jsonschema import Draft202012Validator

SCHEMA = Path(__file__).parents[1] / "audit" / "schema" / "report-2.json"
BODY, PLACES = ("mechanism", "custody", "ledger"), {"wire", "disk", "logs", "reports", "coordinator memory"}
ALWAYS = {"participation-rate", "divisor", "rounding", "frames-uniform", "frames-fresh", "sum-exact"}
NOISY = {"noise-scale", "noise-distribution", "noise-across-rounds", "noise-across-owners", "record-count"}
FREE, KIND, CLIPPED = "without protection", ("attack", "group"), {"clip"}
WHERE = {"ciphertext frames": "train.seal", "opened sums": "query.open", "unclassified": None}

def signature_holds(r):
    raw, rest = base64.b64decode(r["signature"]["public_key"]), {k: r[k] for k in r if k != "signature"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    name = hashlib.sha256(bytes.fromhex("302a300506032b6570032100") + raw).hexdigest()
    try:
        key, value = Ed25519PublicKey.from_public_bytes(raw), base64.b64decode(r["signature"]["value"])
        return name == r["signature"]["signer"] and key.verify(value, b"fedseal/report/1\0" + text) is None
    except InvalidSignature:
        return False

def run_checks(r):
    p, s, claims, enc, log = r["promise"], r["subject"], r["claims"], r["encryption"], r["rounds"]
    opened, known = [e for e in log if not e["void"]], {c["fingerprint"] for c in claims}
    losses = [(x, c["promised"]) for c in claims for x in (c["spent"], c["stated"]) if x]
    over = any(float(x[k]) > float(most[k]) for x, most in losses for k in most)
    over |= any(c["spent"]["epsilon"] == "inf" or not c["promise_matches_plan"] for c in claims)
    wrong = any(c["statement"] == "invalid" or c["disagreements"] for c in claims)
    wrong |= not all(c["certificate_matches"] for c in claims)
    silent = not claims or any(c["statement"] == "missing" for c in claims)
    unsigned = any(c["statement"] != "missing" and not c["model_signed"] for c in claims)
    groups = [set(e["contributors"]) for e in opened]
    small = any(len(g) < p["cohort_minimum"] or not g <= known for g in groups)
    got = [e for e in r["transcript"] if e["direction"] == "received"]
    odd = any(WHERE.get(e["content"], e["kind"]) != e["kind"] for e in got)
    odd |= any(e["content"] == "error code" and e["max_bytes"] > 4096 for e in got)
    each = (enc["frame_bytes"] or 0) / max(1, enc["values_per_frame"])
    large = each > {"exact16": 3.6, "compact": 2.4}.get(enc["preset"], 4) or each >= 4
    pairs, at = [(s["started_at"], s["finished_at"])], datetime.fromisoformat
    pairs += [(c["not_before"], s["started_at"]) for c in r["certificates"]]
    pairs += [(s["finished_at"], c["not_after"]) for c in r["certificates"]]
    old = any(at(a) > at(b) for a, b in pairs) or not all(c["certificate_covers_run"] for c in claims)
    plan = p["evaluation"] or {"every": 1, "evaluations": 0}
    counted = [e["round"] for e in opened if e["purpose"] == "evaluate"]
    extra = sum(e["purpose"] == "evaluate" for e in log) > plan["evaluations"]
    extra |= len({n for n in counted if n % plan["every"] == 0 or n == p["rounds"]}) < len(counted)
    done, moved = len(opened) - len(counted), s["plan_hash"] != s["plan_hash_recomputed"]
    ended = s["state"] == "finished" and done == p["rounds"]
    moved |= s["initial_model_hash"] != s["initial_model_hash_planned"]
    states = {
        "noise-on": (p["noise"] == "none", False), "noise-shares": (False, p["noise"] == "distributed"),
        "budget-kept": (over, not claims), "evaluations-planned": (extra, False),
        "statements-agree": (wrong, silent), "model-countersigned": (unsigned, silent),
        "ledger-forward": (any(c["ledger_went_back"] for c in claims), False),
        "received-content": (odd, not got), "update-size": (large, not enc["frame_bytes"]),
        "cohort-size": (small, not opened), "plan-binding": (moved, False),
        "openings-agree": (any(e["agreeing_openings"] < p["quorum"] for e in opened), not opened),
        "encryption-strength": (enc["security_level_bits"] < 128 or not enc["exact"], False),
        "run-complete": (s["state"] == "failed" or done != s["rounds_finished"], not ended)}
    if s["kind"] == "deployment":
        tls = r["tls"]["version"] == "TLSv1.3" and r["tls"]["client_certificate_required"]
        states |= {"certificates": (old, not r["certificates"]), "tls": (not tls, False)}
        states |= {"no-server-key": (r["server"]["has_secret_key"], False)}
    return states

def tested(r, m):
    have = {t["test"] for t in m["conformance"] if t["threshold"] >= 1e-9}
    lacking = not ALWAYS | (NOISY | CLIPPED if r["promise"]["noise"] != "none" else set()) <= have
    bad = any(t["p_value"] < t["threshold"] for t in m["conformance"])
    return bad, lacking or m["plan_hash"] != r["subject"]["plan_hash"]

def lab_checks(r):
    p, lab = r["promise"], r["laboratory"] or {"ciphertexts": 0, "ciphertexts_repeated": 0}
    mechanism = lab.get("mechanism", {"conformance": [], "bounds": [], "plan_hash": ""})
    mia, tried, scans = (lab.get(k, []) for k in ("membership", "inversion", "markers"))
    states = {"mechanism-conformance": tested(r, mechanism)}
    owners = [f["body"]["mechanism"]["bounds"] for f in r["findings"] if f["valid"]]
    bounds = sum(owners, mechanism["bounds"])
    claimed = [b for b in bounds if b["claimed"] is not None]
    sound = [b for b in claimed if b["confidence"] >= 0.95 and b["delta"] <= p["delta"] * (1 + 1e-6)]
    able = [b for b in sound if (b["control"] or 0) > b["claimed"] and b["detectable"] is not None]
    deaf = len(sound) < len(bounds) or not {"update", "opened sum"} <= {b["observer"] for b in able}
    kept = [(a["tpr_at_1_percent"]["low"], a["ceiling_at_1_percent"]) for a in mia if a["model"] != FREE]
    high, works = any(low > (1 if most is None else most) for low, most in kept), False
    for a in (a for a in mia if a["model"] == FREE):
        same = [b for b in mia if b["model"] == "as planned" and all(b[k] == a[k] for k in KIND)]
        beaten = max((b["tpr_at_1_percent"]["value"] for b in same), default=1)
        works |= a["tpr_at_1_percent"]["low"] > max(0.01, beaten)
    if p["noise"] != "none":
        above = any(b["epsilon"] > b["claimed"] for b in claimed)
        states |= {"membership-inference": (high, not works or any(most is None for _, most in kept))}
        states |= {"lower-bounds": (above, deaf)}
    seen = {"received by the coordinator"} | ({"private update"} if p["noise"] != "none" else set())
    back = {a["observed"] for a in tried if a["rebuilt"]}
    untried = "plain update" not in back or not seen <= {a["observed"] for a in tried}
    wire = [c for c in scans if c["place"] == "wire"]
    blind = not {c["place"] for c in scans if c["markers"]} >= PLACES
    blind |= 0 in [c["control_hits"] for c in scans] + [sum(c["control_hits"] or 0 for c in wire)]
    states |= {"ciphertext-reuse": (lab["ciphertexts_repeated"], not lab["ciphertexts"])}
    found = any(c["hits"] for c in scans)
    return states | {"gradient-inversion": (back & seen, untried), "marker-scan": (found, blind)}

def owner_checks(r):
    run, owners = (None, r["subject"]["run"]), {o["fingerprint"]: o for o in r["owners"]}
    bodies = [(f["signer"], f["body"]) for f in r["findings"] if f["valid"] and f["body"]["run"] in run]
    results, lab = [tested(r, b["mechanism"]) for _, b in bodies], r["laboratory"]
    codes = {m["mechanism"]["code_hash"] for m in [b for _, b in bodies] + ([lab] if lab else [])}
    forged, over = not all(f["valid"] for f in r["findings"]), False
    stored = [k for k in sum((b["custody"] for _, b in bodies), r["keys"]) if k["place"] != "memory"]
    loose = any(not k["encrypted_at_rest"] or int(k["mode"] or "0", 8) & 0o77 for k in stored)
    for c in r["claims"]:
        heads = [owners[c["fingerprint"]]["ledger_last"]]
        heads += [s["body"]["ledger"] for s in [owners[c["fingerprint"]]["statement"]] if s]
        for t in (b["ledger"] for name, b in bodies if name == c["fingerprint"] and b["ledger"]):
            n = {k: float("inf" if t[k] is None else t[k]) for k in t if "_" in k}
            over |= any(n["spent_" + k] > n["cap_" + k] * (1 + 1e-6) for k in ("epsilon", "delta"))
            over |= n["this_run_epsilon"] < float(c["spent"]["epsilon"]) * (1 - 1e-6)
            over |= any(h["sequence"] >= t["sequence"] and h != {k: t[k] for k in h} for h in heads)
    lacks = {k: not owners or {o for o, b in bodies if b[k]} < set(owners) for k in BODY}
    bad, untested = any(bad for bad, _ in results), lacks["mechanism"] or any(lack for _, lack in results)
    states = {"key-custody": (forged or loose, lacks["custody"])}
    states |= {"owner-ledgers": (forged or over, lacks["ledger"])}
    return states | {"owner-code": (forged or bad or len(codes) > 1, untested)}

def main(path):
    r = json.loads(Path(path).read_bytes())
    Draft202012Validator(json.loads(SCHEMA.read_bytes())).validate(r)
    states = run_checks(r) | lab_checks(r)
    states |= owner_checks(r) if r["subject"]["kind"] == "deployment" else {}
    found = {k: "fail" if bad else "missing" if lack else "pass" for k, (bad, lack) in states.items()}
    seen = found.values()
    verdict = "FAIL" if "fail" in seen else "INCONCLUSIVE" if "missing" in seen else "PASS"
    stated = {c["id"]: c["status"] for c in r["checks"] if c["status"] != "not applicable"}
    agrees = found == stated and verdict == r["verdict"]["status"]
    agrees &= r["signature"] is None or signature_holds(r)
    print(verdict if agrees else f"It does not agree. Found: {found}")
    return ("PASS", "FAIL", "INCONCLUSIVE").index(verdict) if agrees else 3

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
