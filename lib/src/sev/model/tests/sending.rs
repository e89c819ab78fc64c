//! Guests that leave for another context.

use super::*;

/// Sends page 0 of `from` to page 4, in `to`.
fn send(
    from: &ModelContext,
    to: &ModelContext,
    target: &ModelPlatform,
    origin: &ModelPlatform,
    share: Option<u32>,
    memory: &Mapping,
) {
    let policy = from.guest_status().unwrap().policy;
    let session = from.send_start(&certs(target)).unwrap();
    to.init(false).unwrap();
    to.receive_start(policy, &origin.pdh().unwrap(), &session, share).unwrap();
    let (header, packet) = from.send_update_data(memory, 0, PAGE_SIZE).unwrap();
    to.receive_update_data(&header, &packet, memory, 4 * PAGE_SIZE).unwrap();
    for bit in [0, 500] {
        let mut bad = packet.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let refused = to.receive_update_data(&header, &bad, memory, 5 * PAGE_SIZE);
        assert_eq!(code(refused), Some(FirmwareError::BadMeasurement));
    }
    let short = to.receive_update_data(&header, &packet[16..], memory, 5 * PAGE_SIZE);
    assert_eq!(code(short), Some(FirmwareError::BadMeasurement));
    from.send_finish().unwrap();
    to.receive_finish().unwrap();
    assert_eq!(from.guest_status().unwrap().state, GuestState::Sent);
    assert_eq!(to.guest_status().unwrap().state, GuestState::Running);
}

#[test]
fn a_guest_is_sent_to_another_platform() {
    let (here, there, memory) = (platform(), ModelPlatform::seeded(2, LIMITS), memory());
    let content = raw(&memory, 0, PAGE);
    let (guest, arrived) = (running(&here, &memory, Policy::SEV), there.context());
    send(&guest, &arrived, &there, &here, None, &memory);
    assert_eq!(plain(&arrived, &memory, 4 * PAGE_SIZE, PAGE), content);
    assert_ne!(plain(&guest, &memory, 4 * PAGE_SIZE, PAGE), content, "under another key");
    let again = guest.send_start(&certs(&there));
    assert_eq!(code(again), Some(FirmwareError::InvalidGuestState), "it runs elsewhere");
}

#[test]
fn a_fresh_context_receives_under_a_shared_key() {
    let (platform, memory) = (platform(), memory());
    let content = raw(&memory, 0, PAGE);
    // The guest whose key is shared is another than the one that is sent: that could not run meanwhile.
    let guest = running(&platform, &memory, 0);
    let helper_memory = self::memory();
    let (helper, received) = (running(&platform, &helper_memory, 0), platform.context());
    let share = guest.guest_status().unwrap().handle;
    send(&helper, &received, &platform, &platform, Some(share), &helper_memory);
    assert_ne!(received.asid(), guest.asid());
    assert_eq!(plain(&received, &memory, 0, PAGE), content, "it reads the guest's memory");
    assert_eq!(plain(&received, &helper_memory, 4 * PAGE_SIZE, PAGE), content);
    assert_eq!(guest.guest_status().unwrap().state, GuestState::Running);
}

#[test]
fn policies_bind_sending_and_sharing() {
    let (platform, there, memory) = (platform(), ModelPlatform::seeded(2, LIMITS), memory());
    let no_send = running(&platform, &memory, Policy::NOSEND);
    assert_eq!(code(no_send.send_start(&certs(&there))), Some(FirmwareError::PolicyFailure));
    let domain = running(&platform, &memory, Policy::DOMAIN);
    assert_eq!(code(domain.send_start(&certs(&there))), Some(FirmwareError::PolicyFailure));
    let nobody = PlatformCerts::from(PdhCert(vec![]));
    assert_eq!(code(domain.send_start(&nobody)), Some(FirmwareError::PolicyFailure));
    domain.send_start(&certs(&platform)).unwrap();
    drop((no_send, domain));

    for policy in [0, Policy::NOKS] {
        let sender = running(&platform, &memory, policy);
        assert_eq!(code(sender.send_start(&nobody)), Some(FirmwareError::InvalidCertificate));
        let session = sender.send_start(&certs(&platform)).unwrap();
        let handle = sender.guest_status().unwrap().handle;
        let to = platform.context();
        to.init(false).unwrap();
        let pdh = platform.pdh().unwrap();
        let receive = |p, share| code(to.receive_start(Policy(p), &pdh, &session, Some(share)));
        // The policy is under the session's MAC, so a receiver cannot change it.
        assert_eq!(receive(policy ^ Policy::NODBG, handle), Some(FirmwareError::BadMeasurement));
        assert_eq!(receive(policy, 999), Some(FirmwareError::InvalidGuest));
        let expected = (policy == Policy::NOKS).then_some(FirmwareError::PolicyFailure);
        assert_eq!(receive(policy, handle), expected);
        sender.send_cancel().unwrap();
        assert_eq!(sender.guest_status().unwrap().state, GuestState::Running);
        sender.send_start(&certs(&there)).unwrap();
    }
}

#[test]
fn sharing_asks_for_equal_policies() {
    let (platform, memory) = (platform(), memory());
    let (sender, other) = (running(&platform, &memory, 0), running(&platform, &memory, Policy::NODBG));
    let session = sender.send_start(&certs(&platform)).unwrap();
    let to = platform.context();
    to.init(false).unwrap();
    let share = other.guest_status().unwrap().handle;
    let refused = to.receive_start(Policy(0), &platform.pdh().unwrap(), &session, Some(share));
    assert_eq!(code(refused), Some(FirmwareError::PolicyFailure));
}
