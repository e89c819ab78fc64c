//! A plan of the mirror's address space: as a short text, and as a few facts to compare.

use std::fmt::Write as _;

use serde_json::Value;

use super::report::size;

/// Code of the exposure that has a column of its own.
pub(super) const GUEST_WRITES: &str = "guest_can_write_helper";

/// Slots, the helper's parts, page tables, exposures.
pub(super) fn text(plan: &Value) -> String {
    let kind = plan["strategy"]["kind"].as_str().unwrap_or("unknown");
    let window = match (word(plan, "addressing"), number(&plan["shift_bytes"])) {
        ("gpa", _) => "RAM where the guest sees it".to_owned(),
        (_, 0) => "RAM window at the RAM address".to_owned(),
        (_, shift) => format!("RAM window at RAM address + {shift:#x}"),
    };
    let mut out = format!("\nplan of the mirror's address space: {kind}, {window}\n");
    out.push_str("  memory slots of the mirror\n");
    for slot in list(&plan["slots"]) {
        let what = match (slot["block"].as_str(), word(slot, "backing")) {
            (Some(block), _) => format!("{block} from RAM address {:#x}", number(&slot["ram_addr"])),
            (None, "private") => "the mirror's alone".to_owned(),
            (None, _) => "shared with the daemon".to_owned(),
        };
        line(&mut out, slot, "mirror_gpa", &what);
    }
    out.push_str("  what the helper's page tables map, by its virtual addresses\n");
    for mapping in list(&plan["mappings"]) {
        let purpose = mapping["purpose"].as_str().unwrap_or_default();
        if !purpose.starts_with("helper_") {
            let to = format!("-> {:#x} {}", number(&mapping["mirror_gpa"]), word(mapping, "access"));
            line(&mut out, mapping, "helper_va", &to);
        }
    }
    let own: Vec<&Value> =
        list(&plan["mappings"]).filter(|m| word(m, "purpose").starts_with("helper_")).collect();
    let bytes = own.iter().map(|m| number(&m["size_bytes"])).sum();
    let place = match (list(&plan["helper"]["pieces"]).count(), plan["helper"]["mirror_gpa"].as_u64()) {
        (0 | 1, Some(at)) => format!("from {at:#x}"),
        (pieces, _) => format!("in {pieces} pieces of its block"),
    };
    let _ = writeln!(out, "    helper         {} mappings of its own, {} {place}", own.len(), size(bytes));
    let tables = &plan["page_tables"];
    let (pages, root) = (number(&tables["pages"]), number(&tables["root"]));
    let _ = writeln!(out, "    page tables    {pages} pages, root at {root:#x}");
    for range in list(&plan["unreachable"]) {
        let (at, len) = (number(&range["ram_addr"]), size(number(&range["size_bytes"])));
        let _ = writeln!(out, "  out of reach: {len} at RAM address {at:#x}: {}", word(range, "code"));
    }
    for exposure in list(&plan["exposures"]) {
        let _ = writeln!(out, "  lays open: {}", word(exposure, "detail"));
    }
    out
}

/// What plans are compared by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// What the helper calls pages by: `ram_addr` or `gpa`.
    pub(super) addressing: String,
    pub(super) slots: usize,
    pub(super) page_table_pages: u64,
    /// Codes of what is laid open.
    pub(super) exposures: Vec<String>,
    /// Codes of why RAM is out of reach, each once.
    pub(super) unreachable: Vec<String>,
    pub(super) unreachable_bytes: u64,
}

impl Facts {
    pub(super) fn of(plan: &Value) -> Self {
        let codes = |field: &str| list(&plan[field]).map(|e| word(e, "code").to_owned());
        let mut unreachable: Vec<String> = codes("unreachable").collect();
        unreachable.sort_unstable();
        unreachable.dedup();
        Self {
            addressing: word(plan, "addressing").to_owned(),
            slots: list(&plan["slots"]).count(),
            page_table_pages: number(&plan["page_tables"]["pages"]),
            exposures: codes("exposures").collect(),
            unreachable,
            unreachable_bytes: list(&plan["unreachable"]).map(|u| number(&u["size_bytes"])).sum(),
        }
    }

    /// Whether the guest can write the helper that runs in its mirror.
    pub(super) fn guest_writes_helper(&self) -> bool {
        self.exposures.iter().any(|code| code == GUEST_WRITES)
    }
}

fn line(out: &mut String, item: &Value, start: &str, what: &str) {
    let purpose = word(item, "purpose").replace('_', " ");
    let (at, len) = (number(&item[start]), size(number(&item["size_bytes"])));
    let _ = writeln!(out, "    {purpose:<14} {at:#015x} {len:>9}  {what}");
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn word<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_plan_is_a_few_lines() {
        let plan = json!({
            "strategy": {"kind": "shifted"}, "addressing": "ram_addr", "shift_bytes": 1u64 << 32,
            "slots": [
                {"mirror_gpa": 1u64 << 32, "size_bytes": 64 << 20, "purpose": "ram_window", "block": "ram0", "ram_addr": 0},
                {"mirror_gpa": 1u64 << 33, "size_bytes": 8192, "purpose": "mailbox", "block": null, "ram_addr": null},
            ],
            "mappings": [
                {"purpose": "helper_text", "helper_va": 4096, "mirror_gpa": 0, "size_bytes": 4096, "access": "read_execute"},
                {"purpose": "ram_window", "helper_va": 8192, "mirror_gpa": 1u64 << 32, "size_bytes": 64 << 20, "access": "read_write"},
            ],
            "helper": {"mirror_gpa": 12288, "pieces": [{}]}, "page_tables": {"pages": 3, "root": 4096},
            "unreachable": [{"code": "unplugged", "ram_addr": 0, "size_bytes": 4096},
                            {"code": "unplugged", "ram_addr": 8192, "size_bytes": 4096}],
            "exposures": [{"code": "guest_can_write_helper", "detail": "the window"}],
        });
        let facts = Facts::of(&plan);
        assert!(facts.guest_writes_helper());
        assert_eq!(facts.addressing, "ram_addr");
        assert_eq!((facts.slots, facts.page_table_pages, facts.unreachable_bytes), (2, 3, 8192));
        assert_eq!(facts.unreachable, ["unplugged"]);
        let text = text(&plan);
        for part in [
            "shifted, RAM window at RAM address + 0x100000000",
            "ram window     0x0000100000000    64 MiB  ram0 from RAM address 0x0",
            "mailbox        0x0000200000000     8 KiB  shared with the daemon",
            "ram window     0x0000000002000    64 MiB  -> 0x100000000 read_write",
            "helper         1 mappings of its own, 4 KiB from 0x3000",
            "page tables    3 pages, root at 0x1000",
            "lays open: the window",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
