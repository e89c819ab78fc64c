//! What each strategy lays open, in stable codes and plain sentences.

use super::{Confidentiality, Exposure, PlanRequest, PspVia, RamBlock, Unreachable};

/// What holds whatever the strategy: who sees registers and memory, who owns slots, by whom memory is pinned.
/// `owned_elsewhere`: the helper's memory is in no slot of the guest.
fn common(request: &PlanRequest<'_>, owned_elsewhere: bool) -> Vec<Exposure> {
    let mut list = vec![match request.confidentiality {
        Confidentiality::None => exposure(
            "host_sees_everything",
            "without memory encryption the host can read and write all memory of guest and mirror, the helper's \
             keys included; seals protect against the network and the peer's disk alone",
        ),
        Confidentiality::Sev => exposure(
            "host_sees_registers",
            "on plain SEV the registers of the mirror's vCPUs, key material in use included, lie open to the host; \
             the promise holds against a host that does not look",
        ),
        Confidentiality::SevEs | Confidentiality::SevSnp => exposure(
            "host_sees_access_patterns",
            "registers and private memory are closed to the host; it still sees which pages are touched and when",
        ),
    }];
    list.push(exposure(
        "host_owns_slots",
        "the host decides which memory is behind every address of the mirror and can take it away or exchange it; \
         integrity comes from seals, not from the address space",
    ));
    if request.confidentiality.is_encrypted() {
        if owned_elsewhere {
            list.push(exposure(
                "helper_memory_unpinned",
                "the helper's memory is in no slot of the guest, and a mirror cannot pin memory: unless the guest's own \
                 VM registers it, the kernel may move it, and ciphertext that moved is garbage",
            ));
        }
        list.push(exposure(
            "key_shared_with_mirror",
            "the mirror runs under the guest's memory encryption key (KVM copies the encryption context): whatever \
             runs in the mirror reads what the guest reads",
        ));
    }
    if !request.read_only_text {
        list.push(exposure(
            "helper_text_in_writable_slots",
            "only the helper's own page tables keep its code from being written by the mirror; the slots over it \
             are writable",
        ));
    }
    list
}

fn guest_can_write() -> Exposure {
    exposure(
        "guest_can_write_helper",
        "the helper lies in the guest's own memory: the guest can rewrite it and leak its own keys or use the host's \
         helper threads; it harms itself, the host treats the helper as untrusted",
    )
}

fn hidden() -> Exposure {
    exposure(
        "helper_hidden_from_guest",
        "the helper's block has no guest physical address: the guest cannot write it, and it was not part of the \
         guest's own launch",
    )
}

fn reaches_all(detail: &str) -> Exposure {
    exposure("mirror_reaches_all_ram", detail)
}

fn exposure(code: &'static str, detail: &str) -> Exposure {
    Exposure { code, detail: detail.to_owned() }
}

pub(super) fn shifted(request: &PlanRequest<'_>, helper: &RamBlock) -> Vec<Exposure> {
    let mut list = vec![if helper.plugs.is_empty() { hidden() } else { guest_can_write() }];
    list.push(reaches_all(
        "the mirror's slots cover all RAM, the bottom 4 GiB twice; the helper's page tables map each page of RAM once, \
         writable, and of the bottom 4 GiB only the helper's own block",
    ));
    list.extend(common(request, helper.plugs.is_empty()));
    list
}

pub(super) fn identity(
    request: &PlanRequest<'_>,
    helper: &RamBlock,
    unreachable: &[Unreachable],
) -> Vec<Exposure> {
    let mut list = vec![guest_can_write()];
    list.push(reaches_all(
        "the mirror's slots are the guest's whole physical address space, the helper's block included",
    ));
    if request.confidentiality.is_encrypted() {
        list.push(exposure(
            "plain_alias",
            "the mailbox is mapped without the C-bit, at another virtual address than everything else: what the \
             helper writes there the host reads",
        ));
    } else {
        list.push(exposure(
            "no_c_bit",
            "the guest is not encrypted: the layout is that of the prototype, but no entry of the page tables has a \
             C-bit, and private and shared pages differ in nothing",
        ));
    }
    if !unreachable.is_empty() {
        list.push(exposure(
            "unplugged_shared_ram_left_to_host",
            "shared RAM that is not plugged is out of the helper's reach; the host moves it, unsealed as all shared \
             pages",
        ));
    }
    list.extend(common(request, helper.plugs.is_empty()));
    list
}

pub(super) fn declared(request: &PlanRequest<'_>, helper: &RamBlock) -> Vec<Exposure> {
    let mut list = vec![guest_can_write()];
    list.push(exposure(
        "guest_chose_layout",
        "the guest decides from which pages of the helper's block the mirror runs, and where they appear; the host \
         has checked that they are that block's and nothing else",
    ));
    list.push(reaches_all(
        "the mirror's slots cover all RAM once, in the window, and of the guest's own address space only what the \
         helper declared",
    ));
    list.extend(common(request, helper.plugs.is_empty()));
    list
}

pub(super) fn psp_copied(request: &PlanRequest<'_>, via: PspVia) -> Vec<Exposure> {
    let mut list = vec![exposure(
        "helper_private_to_mirror",
        "the helper's memory is in no slot of the guest: the guest cannot write it, and trusts the host's choice of \
         helper as far as it checks the measurement",
    )];
    list.push(reaches_all(
        "the mirror's slots cover all RAM once, at its RAM address, and the helper's private memory",
    ));
    if via == PspVia::SendReceive {
        list.push(exposure(
            "policy_allows_send_and_sharing",
            "the way through SEND and RECEIVE needs a guest policy without NOSEND and NOKS: the firmware would give \
             the guest's pages and its key to other contexts, too",
        ));
    }
    list.extend(common(request, true));
    list
}
