//! Machines: what cannot be, what is filled in, and the command line, which never changes for a machine that
//! there is.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};

use proptest::prelude::*;
use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::qemu::accel::Accel;
use crate::qemu::command::Arriving;
use crate::reading::shape::without_nulls;
use crate::reading::{FieldError, Json, decode};

fn machine(value: Value) -> Machine {
    decode(&Json::from(&value)).unwrap()
}

fn settled(value: Value) -> Machine {
    let mut count = 0;
    machine(value).settled(Accel::Tcg, || {
        count += 1;
        [0, 0, count]
    })
}

fn wrong(machine: &Machine) -> Vec<(String, &'static str)> {
    let mut errors: Vec<FieldError> = Vec::new();
    machine.check(1, false, &mut errors);
    errors.into_iter().map(|e| (e.pointer, e.code)).collect()
}

fn whole(machine: &str) -> Value {
    json!({
        "machine": machine,
        "topology": {"sockets": 1, "cores": 2, "threads": 1},
        "firmware": {"code": "/i/CODE.fd", "nvram": "/v/VARS.fd"},
        "disks": [
            {"name": "root", "path": "/v/root.qcow2", "boot_index": 0, "serial": "R-1",
                "backing": {"path": "/i/base.qcow2", "format": "qcow2"},
                "limits": {"operations_per_second": 500, "bytes_per_second": 1 << 20}},
            {"name": "data", "path": "/v/data.raw", "format": "raw", "bus": "scsi", "cache": "writethrough",
                "discard": "ignore", "on_error": "report"},
            {"name": "cd", "bus": "sata", "media": "cdrom"},
        ],
        "nics": [
            {"name": "lan", "network": {"kind": "user", "forwards": [{"host_port": 8080, "guest_port": 80}]}, "mtu": 1400},
            {"name": "old", "network": {"kind": "user"}, "model": "e1000e", "mac": "02:00:00:00:00:09", "address": "0a.0"},
        ],
        "cloud_init": {"user_data": "#cloud-config"},
        "smbios": {"manufacturer": "Acme, Inc."},
    })
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

/// The arguments with numbers that do not depend on what else is open: descriptors in the order in which they
/// are passed.
fn arguments(machine: &Machine, arriving: Option<Arriving>) -> Vec<String> {
    let count = Passed::of(machine, false, false, Vec::new()).map_or_else(
        || {
            (0..64)
                .find(|n| Passed::of(machine, false, false, (0..*n).map(|_| null()).collect()).is_some())
                .unwrap()
        },
        |_| 0,
    );
    let fds: Vec<OwnedFd> = (0..count).map(|_| null()).collect();
    let numbers: Vec<i32> = fds.iter().map(OwnedFd::as_raw_fd).collect();
    let passed = Passed::of(machine, false, false, fds).unwrap();
    let line = Line {
        accel: Accel::Tcg,
        machine,
        vcpus: 2,
        memory_bytes: 512 << 20,
        append: "",
        id: Uuid::from_u128(7),
        passed: &passed,
        qmp: -1,
        arriving,
    };
    let named = |argument: String| {
        numbers.iter().enumerate().fold(argument, |text, (i, n)| {
            text.replace(&format!("/self/fd/{n}\""), &format!("/self/fd/<{i}>\""))
                .replace(&format!("fd={n},"), &format!("fd=<{i}>,"))
        })
    };
    let mut arguments: Vec<String> = line.arguments().into_iter().map(named).collect();
    for argument in &mut arguments {
        if argument.starts_with("socket,id=agent,fd=") {
            *argument = "socket,id=agent,fd=<agent>".into();
        }
    }
    arguments
}

fn golden(name: &str, machine: &Machine, arriving: Option<Arriving>) {
    let path = format!("{}/src/qemu/testdata/line-{name}.txt", env!("CARGO_MANIFEST_DIR"));
    let mut text = String::new();
    for argument in arguments(machine, arriving) {
        text.push_str(if argument.starts_with('-') && !text.is_empty() {
            "\n"
        } else if text.is_empty() {
            ""
        } else {
            " "
        });
        text.push_str(&argument);
    }
    text.push('\n');
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, kept, "guests know their devices by what stands in {path}; UPDATE_GOLDEN=1 writes it");
}

#[test]
fn a_machine_is_told_as_it_always_was() {
    golden("pc", &settled(whole("pc-i440fx-7.2")), None);
    golden("q35", &settled(whole("q35")), Some(Arriving::ToRun));
    golden("before", &Machine::before(), None);
}

#[test]
fn what_was_left_out_is_filled_in_once_and_stays() {
    let machine = settled(whole("q35"));
    assert_eq!(wrong(&machine), [("/driver/topology".to_owned(), "impossible")], "of one vCPU here");
    let places: Vec<_> = machine.disks.iter().map(|d| d.address.map(|p| p.to_string())).collect();
    assert_eq!(places, [Some("08.0".into()), None, None]);
    let nics: Vec<_> =
        machine.nics.iter().map(|n| (n.address.unwrap().to_string(), n.mac.unwrap().to_string())).collect();
    assert_eq!(
        nics,
        [("08.1".into(), "52:54:00:00:00:01".into()), ("0a.0".into(), "02:00:00:00:00:09".to_owned())]
    );
    assert_eq!(machine.cpu.as_ref().unwrap().model, "qemu64");
    let again = machine.clone().settled(Accel::Kvm, || unreachable!("all have an address"));
    assert_eq!(again, machine);
    let pc = settled(whole("pc"));
    assert_eq!(pc.nics[0].address.unwrap().to_string(), "09.0");
}

#[test]
fn what_cannot_be_is_named_all_at_once() {
    let mut bad = whole("pc");
    bad["topology"] = Value::Null;
    bad["machine"] = json!("microvm");
    bad["firmware"]["secure_boot"] = json!(true);
    bad["disks"][0]["serial"] = json!("a b");
    bad["disks"][1]["backing"] = json!({"path": "/i/x", "format": "raw"});
    bad["disks"][1]["address"] = json!("09.0");
    bad["disks"][2]["bus"] = json!("virtio");
    bad["disks"][2]["name"] = json!("root");
    bad["nics"][0]["mac"] = json!("02:00:00:00:00:09");
    bad["nics"][0]["address"] = json!("0a.0");
    bad["nics"][1]["mtu"] = json!(1500);
    bad["smbios"]["serial"] = json!("\u{1}");
    let found = wrong(&machine(bad).settled(Accel::Tcg, || [1, 2, 3]));
    let expected = [
        ("machine", "unknown_value"),
        ("firmware/secure_boot", "impossible"),
        ("disks/0/serial", "invalid_format"),
        ("disks/1/backing", "impossible"),
        ("disks/1/address", "impossible"),
        ("disks/2/bus", "impossible"),
        ("nics/1/mac", "duplicate"),
        ("nics/1/mtu", "impossible"),
        ("disks/2/name", "duplicate_name"),
        ("nics/1/address", "duplicate"),
        ("smbios/serial", "invalid_format"),
    ];
    assert_eq!(found, expected.map(|(at, code)| (format!("/driver/{at}"), code)));
    let of = |value: Value| wrong(&settled(value));
    assert_eq!(of(json!({})), [("/driver/kernel".to_owned(), "missing")]);
    let twice = json!({"disks": [{"name": "a", "path": "/v/a"}, {"name": "b", "path": "/v/a"}]});
    assert_eq!(of(twice), [("/driver/disks/1/path".to_owned(), "duplicate")]);
    let none = json!({"disks": [{"name": "a"}]});
    assert_eq!(of(none), [("/driver/disks/0/path".to_owned(), "missing")]);
    let odd = json!({"machine": "pc", "disks": [{"name": "a", "path": "/v/a", "address": "08.3"}]});
    assert_eq!(of(odd), [("/driver/disks/0/address".to_owned(), "impossible")]);
    let ports = json!({"nics": [{"name": "a", "network": {"kind": "user", "forwards": [
        {"host_port": 1, "guest_port": 1}, {"host_port": 1, "guest_port": 2}]}}]});
    assert_eq!(of(ports), [("/driver/nics/0/network/forwards/1/host_port".to_owned(), "duplicate")]);
}

#[test]
fn descriptors_are_those_of_the_machine_and_no_others() {
    let machine = settled(whole("q35"));
    // Code, two of the variables, two of root and its backing, two of data, the seed, the agent.
    for count in 0..12 {
        let passed = Passed::of(&machine, false, false, (0..count).map(|_| null()).collect());
        assert_eq!(passed.is_some(), count == 10, "{count}");
    }
    let list: Vec<OwnedFd> = (0..12).map(|_| null()).collect();
    let numbers: Vec<i32> = list.iter().map(OwnedFd::as_raw_fd).collect();
    let back = Passed::of(&machine, true, true, list).unwrap().into_list();
    assert_eq!(back.iter().map(OwnedFd::as_raw_fd).collect::<Vec<_>>(), numbers);
}

fn any_disk() -> impl Strategy<Value = Value> {
    (prop_oneof![Just("virtio"), Just("scsi"), Just("sata")], prop::option::of(0u8..8), any::<bool>())
        .prop_map(|(bus, function, cd)| {
            let mut disk = json!({"bus": bus, "path": "/v/x", "format": "raw"});
            if cd && bus != "virtio" {
                disk["media"] = json!("cdrom");
            }
            if let Some(function) = function.filter(|_| bus == "virtio") {
                disk["address"] = json!(format!("0{}.{}", 8 + function % 2, function));
            }
            disk
        })
}

fn any_machine() -> impl Strategy<Value = Machine> {
    let nic = prop::option::of(0u8..8).prop_map(|function| match function {
        Some(function) => json!({"network": {"kind": "user"}, "address": format!("08.{function}")}),
        None => json!({"network": {"kind": "user"}}),
    });
    let parts = (prop::collection::vec(any_disk(), 0..16), prop::collection::vec(nic, 0..8), any::<bool>());
    parts.prop_map(|(mut disks, mut nics, q35)| {
        for (i, disk) in disks.iter_mut().enumerate() {
            disk["name"] = json!(format!("d{i}"));
            disk["path"] = json!(format!("/v/{i}"));
        }
        for (i, nic) in nics.iter_mut().enumerate() {
            nic["name"] = json!(format!("n{i}"));
        }
        machine(json!({"machine": if q35 { "q35" } else { "pc" }, "disks": disks, "nics": nics}))
    })
}

/// Bus and address of every device on the command line that says one.
fn places(machine: &Machine) -> Vec<(String, String)> {
    let arguments = arguments(machine, None);
    let devices = arguments.windows(2).filter(|w| w[0] == "-device");
    let devices = devices.map(|w| serde_json::from_str::<Value>(&w[1]).unwrap());
    devices.filter_map(|d| Some((d["bus"].as_str()?.to_owned(), d["addr"].as_str()?.to_owned()))).collect()
}

proptest! {
    #[test]
    fn no_definition_yields_two_devices_at_one_place(machine in any_machine()) {
        let mut count = 0;
        let machine = machine.settled(Accel::Tcg, || { count += 1; [0, 0, count] });
        if wrong(&machine).iter().all(|(at, _)| at == "/driver/kernel") {
            let places = places(&machine);
            let one_each: BTreeSet<_> = places.iter().collect();
            prop_assert_eq!(one_each.len(), places.len(), "{:?}", places);
        } else {
            // Two that asked for one place, or a function that there is not: said, not moved.
            prop_assert!(wrong(&machine).iter().all(|(at, _)| at.ends_with("/address") || at == "/driver/disks"));
        }
    }

    #[test]
    fn an_edit_and_its_undoing_leave_the_definition(machine in any_machine(), more in any_disk()) {
        let mut count = 0;
        let before = machine.settled(Accel::Tcg, || { count += 1; [0, 0, count] });
        let mut edited = before.clone();
        let mut more: Disk = decode(&Json::from(&{ let mut m = more; m["name"] = json!("more"); m })).unwrap();
        more.address = None;
        edited.disks.push(more);
        let mut edited = edited.settled(Accel::Tcg, || unreachable!());
        prop_assert_eq!(&edited.disks[..before.disks.len()], &before.disks[..]);
        edited.disks.pop();
        prop_assert_eq!(edited, before);
    }

    #[test]
    fn a_definition_is_read_back_as_it_was_written(machine in any_machine()) {
        let machine = machine.settled(Accel::Tcg, || [9, 9, 9]);
        let written = without_nulls(serde_json::to_value(&machine).unwrap());
        prop_assert_eq!(&decode::<Machine>(&Json::from(&written)).unwrap(), &machine);
        prop_assert_eq!(serde_json::from_value::<Machine>(serde_json::to_value(&machine).unwrap()).unwrap(), machine);
    }

    #[test]
    fn places_and_addresses_are_read_or_refused(text in "\\PC{0,20}") {
        if let Ok(place) = text.parse::<Place>() {
            prop_assert_eq!(place.to_string(), text.clone());
        }
        if let Ok(mac) = text.parse::<Mac>() {
            prop_assert_eq!(mac.to_string(), text.to_lowercase());
        }
    }
}
